package objstore_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
)

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// wantErr checks class and words, and that no words are those of a secret.
func wantErr(t testing.TB, err, class error, words ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("got %v, want %v", err, class)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q lacks %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "secret-access") {
		t.Errorf("%q has the secret in it", err)
	}
	t.Log(err)
}

func list(ctx context.Context, s objstore.Store) error {
	for _, err := range s.List(ctx, "x/", "", "") {
		return err
	}
	return nil
}

func TestS3Errors(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{Region: "eu-test-1"})
	good := srv.Bucket("bucket").ObjStore()
	good.Region = ""
	if err := list(t.Context(), openStore(t, good)); err != nil {
		t.Fatal(err)
	}
	with := func(change func(c *objstore.Config)) objstore.Config {
		c := good
		change(&c)
		return c
	}
	for _, c := range []struct {
		name  string
		cfg   objstore.Config
		class error
		words []string
	}{
		{"access key id", with(func(c *objstore.Config) { c.AccessKeyID = "AKIAWRONGWRONG" }), objstore.ErrDenied, []string{"AKIAWRON…", "access key id"}},
		{"secret", with(func(c *objstore.Config) { c.SecretAccessKey = "secret-access-wrong" }), objstore.ErrDenied, []string{"the secret access key is not the one"}},
		{"bucket", with(func(c *objstore.Config) { c.Bucket = "nothere" }), objstore.ErrNoBucket, []string{`"nothere"`, "create it"}},
		{"region", with(func(c *objstore.Config) { c.Region = "us-west-9" }), objstore.ErrRegion, []string{`"eu-test-1"`}},
		{"port", with(func(c *objstore.Config) { c.Endpoint = "http://127.0.0.1:1" }), objstore.ErrUnavailable, []string{"refuses connections"}},
		{"name", with(func(c *objstore.Config) { c.Endpoint = "https://s3.invalid" }), objstore.ErrUnavailable, []string{"bucket.s3.invalid"}},
		{"TLS", with(func(c *objstore.Config) { c.Endpoint = strings.Replace(c.Endpoint, "http:", "https:", 1) }), objstore.ErrUnavailable, []string{"does not speak TLS"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.name == "name" {
				c.cfg.PathStyle = false
			}
			s := openStore(t, c.cfg)
			wantErr(t, list(within(t, 20*time.Second), s), c.class, c.words...)
			_, err := s.Put(within(t, 20*time.Second), "k", []byte("x"), objstore.PutOptions{})
			wantErr(t, err, c.class, c.words...)
		})
	}
	t.Run("the region is found, once", func(t *testing.T) {
		for _, region := range []string{"", "auto"} {
			c := with(func(c *objstore.Config) { c.Region = region })
			got, err := objstore.Region(within(t, time.Minute), c)
			if err != nil || got != "eu-test-1" {
				t.Errorf("region of %q: %q, %v", region, got, err)
			}
		}
	})
}

// fake is an S3 server that answers what a test wants.
func fake(t testing.TB, h http.HandlerFunc) objstore.Config {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return objstore.Config{
		Endpoint: srv.URL, Bucket: "bucket", AccessKeyID: "AKID", SecretAccessKey: "secret-access", Region: "us-east-1",
		Timeouts: objstore.Timeouts{Header: 300 * time.Millisecond, Stall: 300 * time.Millisecond, Retry: time.Millisecond},
	}
}

func s3Error(w http.ResponseWriter, status int, code, message, more string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message>%s</Error>`, code, message, more)
}

const emptyList = `<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated></ListBucketResult>`

func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		name    string
		status  int
		ctype   string
		body    string
		class   error
		words   string
		retried bool
	}{
		{"slow down", 503, "application/xml", `<Error><Code>SlowDown</Code><Message>m</Message></Error>`, objstore.ErrUnavailable, "slow down", true},
		{"internal error", 500, "application/xml", `<Error><Code>InternalError</Code><Message>broken</Message></Error>`, objstore.ErrUnavailable, "broken", true},
		{"proxy without a server", 502, "text/html", `<html>Bad Gateway</html>`, objstore.ErrUnavailable, "502", true},
		{"throttled by a proxy", 429, "text/html", `<html>Too many</html>`, objstore.ErrUnavailable, "slow down", true},
		{"not implemented", 501, "application/xml", `<Error><Code>NotImplemented</Code><Message>no such thing</Message></Error>`, objstore.ErrUnsupported, "no such thing", false},
		{"access denied", 403, "application/xml", `<Error><Code>AccessDenied</Code><Message>no</Message></Error>`, objstore.ErrDenied, "may not do this", false},
		{"clock", 403, "application/xml", `<Error><Code>RequestTimeTooSkewed</Code></Error>`, objstore.ErrDenied, "clock", false},
		{"another endpoint", 301, "application/xml", `<Error><Code>PermanentRedirect</Code><Message>use another</Message></Error>`, objstore.ErrRegion, "bucket", false},
		{"web page", 404, "text/html", `<!DOCTYPE html><html>nothing here</html>`, objstore.ErrUnsupported, "no S3 server", false},
		{"web page that is fine", 200, "text/html", `<html>welcome</html>`, objstore.ErrUnsupported, "no S3 server", false},
		{"another API", 404, "application/json", `{"error":"not found"}`, objstore.ErrUnsupported, "no S3 server", false},
		{"refused by a web server", 403, "text/html", `<html>Forbidden</html>`, objstore.ErrUnsupported, "Forbidden", false},
		{"TLS only", 400, "text/plain", "Client sent an HTTP request to an HTTPS server.\n", objstore.ErrUnsupported, "https://", false},
		{"XML of something else", 200, "application/xml", `<?xml version="1.0"?><rss></rss>`, objstore.ErrUnsupported, "no S3 server", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int64
			s := openStore(t, fake(t, func(w http.ResponseWriter, _ *http.Request) {
				requests.Add(1)
				w.Header().Set("Content-Type", c.ctype)
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
			}))
			wantErr(t, list(t.Context(), s), c.class, c.words)
			if n := requests.Load(); (n > 1) != c.retried || n > 4 {
				t.Errorf("%d requests", n)
			}
			if c.status < 300 {
				return // for other requests than a list any body will do
			}
			requests.Store(0)
			_, err := s.Put(t.Context(), "k", []byte("x"), objstore.PutOptions{})
			wantErr(t, err, c.class, c.words)
			if n := requests.Load(); (n > 1) != c.retried || n > 4 {
				t.Errorf("%d puts", n)
			}
		})
	}
}

func TestRedirectOfAWebServer(t *testing.T) {
	s := openStore(t, fake(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://elsewhere.example/", http.StatusMovedPermanently)
	}))
	_, _, err := s.Get(t.Context(), "k")
	wantErr(t, err, objstore.ErrUnsupported, "https://elsewhere.example/")
}

// Only what was surely not done is repeated with a condition: a second If-Match would
// fail on the first one's success, and a second If-None-Match too.
func TestConditionalPutIsNotRepeated(t *testing.T) {
	conditions := map[string]objstore.PutOptions{
		"If-Match":      {IfMatch: "e1"},
		"If-None-Match": {IfNoneMatch: true},
		"none":          {},
	}
	for _, c := range []struct {
		name   string
		answer func(w http.ResponseWriter, r *http.Request)
		safe   bool // surely not done
	}{
		{"500", func(w http.ResponseWriter, _ *http.Request) { s3Error(w, 500, "InternalError", "m", "") }, false},
		{"503 of a proxy", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, false},
		{"504", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(504) }, false},
		{"connection lost", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, false},
		{"no answer", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, false},
		{"slow down", func(w http.ResponseWriter, _ *http.Request) { s3Error(w, 503, "SlowDown", "m", "") }, true},
		{"conflict", func(w http.ResponseWriter, _ *http.Request) { s3Error(w, 409, "ConditionalRequestConflict", "m", "") }, true},
	} {
		for name, o := range conditions {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				var puts atomic.Int64
				s := openStore(t, fake(t, func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					puts.Add(1)
					c.answer(w, r)
				}))
				_, err := s.Put(t.Context(), "head", []byte("x"), o)
				wantErr(t, err, objstore.ErrUnavailable)
				conditional := name != "none"
				if n := puts.Load(); conditional && !c.safe && n != 1 {
					t.Errorf("sent %d times", n)
				} else if (!conditional || c.safe) && n < 2 {
					t.Errorf("sent %d times: it may be repeated", n)
				}
			})
		}
	}
}

func TestRetrySucceeds(t *testing.T) {
	var n atomic.Int64
	s := openStore(t, fake(t, func(w http.ResponseWriter, _ *http.Request) {
		switch n.Add(1) {
		case 1:
			w.WriteHeader(500)
		case 2: // cut off
			w.Header().Set("Content-Length", "10")
			w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
			io.WriteString(w, "hal")
		default:
			w.Header().Set("Content-Length", "7")
			w.Header().Set("ETag", `"e"`)
			w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
			io.WriteString(w, "content")
		}
	}))
	data, o, err := s.Get(t.Context(), "k")
	if err != nil || string(data) != "content" || o.ETag != "e" {
		t.Errorf("%q, %+v, %v", data, o, err)
	}
}

// A list goes on where it was cut off, and neither repeats nor drops anything.
func TestListGoesOn(t *testing.T) {
	var n atomic.Int64
	s := openStore(t, fake(t, func(w http.ResponseWriter, r *http.Request) {
		page := func(truncated bool, keys ...string) {
			w.Header().Set("Content-Type", "application/xml")
			fmt.Fprintf(w, `<ListBucketResult><IsTruncated>%v</IsTruncated>`, truncated)
			if truncated {
				fmt.Fprint(w, `<NextContinuationToken>next</NextContinuationToken>`)
			}
			for _, k := range keys {
				fmt.Fprintf(w, `<Contents><Key>%s</Key><LastModified>2026-01-01T00:00:00Z</LastModified><ETag>"e"</ETag><Size>1</Size></Contents>`, k)
			}
			fmt.Fprint(w, `</ListBucketResult>`)
		}
		q := r.URL.Query()
		switch i := n.Add(1); {
		case i == 1:
			page(true, "a", "b")
		case i == 2 && q.Get("continuation-token") == "next":
			s3Error(w, 500, "InternalError", "m", "")
		case i == 3 && q.Get("start-after") == "b" && q.Get("continuation-token") == "":
			page(false, "b", "c") // a server may well repeat
		default:
			s3Error(w, 400, "Unexpected", r.URL.String(), "")
		}
	}))
	var got []string
	for o, err := range s.List(t.Context(), "", "", "") {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, o.Key)
	}
	if strings.Join(got, "") != "abc" {
		t.Errorf("listed %q", got)
	}
}

// A server that says where the bucket is, is asked there.
func TestRegionFromRefusal(t *testing.T) {
	var regions []string
	h := func(w http.ResponseWriter, r *http.Request) {
		_, scope, _ := strings.Cut(r.Header.Get("Authorization"), "Credential=AKID/")
		region := strings.Split(scope+"///", "/")[1]
		regions = append(regions, region)
		switch {
		case r.URL.Query().Has("location"):
			s3Error(w, 501, "NotImplemented", "no locations here", "")
		case region != "eu-9":
			s3Error(w, 400, "AuthorizationHeaderMalformed", "the region 'x' is wrong", "<Region>eu-9</Region>")
		default:
			io.WriteString(w, emptyList)
		}
	}
	c := fake(t, h)
	c.Region = "auto"
	s := openStore(t, c)
	for range 2 {
		if err := list(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(regions, " "); got != "us-east-1 us-east-1 eu-9 eu-9" {
		t.Errorf("asked in %s", got)
	}
	c.Region = "us-1"
	wantErr(t, list(t.Context(), openStore(t, c)), objstore.ErrRegion, `"eu-9"`)
}

func TestUntrustedCertificate(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	s := openStore(t, objstore.Config{Endpoint: srv.URL, Bucket: "bucket", Region: "r"})
	wantErr(t, list(t.Context(), s), objstore.ErrUnavailable, "certificate", "CA")
}

// No wait is without end: not for an answer, nor for the rest of one, nor for a
// server that takes no more of what is sent.
func TestStalls(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	p := srv.Proxy(0)
	c := p.Config(srv.Bucket("bucket")).ObjStore()
	c.Timeouts = objstore.Timeouts{Dial: time.Second, Header: 500 * time.Millisecond, Stall: 500 * time.Millisecond, Retry: time.Millisecond}
	s := openStore(t, c)
	big := make([]byte, 32<<20)
	if _, err := s.Put(t.Context(), "k", big, objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	p.Blackhole()
	_, err := s.Put(within(t, time.Minute), "k", big, objstore.PutOptions{IfMatch: "x"})
	wantErr(t, err, objstore.ErrUnavailable, "too long")
	_, err = s.Stat(within(t, time.Minute), "k")
	wantErr(t, err, objstore.ErrUnavailable, "too long")
	p.Cut()
	_, err = s.Stat(within(t, time.Minute), "k")
	wantErr(t, err, objstore.ErrUnavailable)
	p.Resume()
	if _, err := s.Stat(within(t, time.Minute), "k"); err != nil {
		t.Errorf("after the outage: %v", err)
	}
	srv.Kill()
	_, err = s.Stat(within(t, time.Minute), "k")
	wantErr(t, err, objstore.ErrUnavailable)
	srv.Start()
	if o, err := s.Stat(within(t, time.Minute), "k"); err != nil || o.Size != int64(len(big)) {
		t.Errorf("after the restart: %+v, %v", o, err)
	}
}

func TestStallOfAnAnswer(t *testing.T) {
	release := make(chan struct{})
	var requests atomic.Int64
	s := openStore(t, fake(t, func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		w.Header().Set("Content-Length", "10")
		w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
		io.WriteString(w, "half ")
		w.(http.Flusher).Flush()
		<-release
	}))
	t.Cleanup(func() { close(release) })
	_, _, err := s.Get(within(t, time.Minute), "k")
	wantErr(t, err, objstore.ErrUnavailable, "in the middle")
	if n := requests.Load(); n < 2 {
		t.Errorf("%d requests", n)
	}
}

func TestServerWithoutRanges(t *testing.T) {
	s := openStore(t, fake(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
		io.WriteString(w, "0123456789")
	}))
	_, err := s.GetRange(t.Context(), "k", 2, 3)
	wantErr(t, err, objstore.ErrUnsupported, "ranges")
	if data, err := s.GetRange(t.Context(), "k", 0, 10); err != nil || string(data) != "0123456789" {
		t.Errorf("all of it: %q, %v", data, err)
	}
}

func TestDeleteWithoutMultiDelete(t *testing.T) {
	var deleted []string
	s := openStore(t, fake(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodDelete {
			s3Error(w, 501, "NotImplemented", "m", "")
			return
		}
		deleted = append(deleted, r.URL.Path)
		w.WriteHeader(http.StatusNoContent)
	}))
	if err := s.Delete(t.Context(), "a", "b"); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(deleted, " "); got != "/bucket/a /bucket/b" {
		t.Errorf("deleted %s", got)
	}
}

func TestUsesPathStyle(t *testing.T) {
	for _, c := range []struct {
		endpoint, bucket string
		asked, want      bool
	}{
		{"https://s3.eu-west-1.amazonaws.com", "bucket", false, false},
		{"https://fly.storage.tigris.dev", "bucket", false, false},
		{"https://fly.storage.tigris.dev", "bucket", true, true},
		{"https://fly.storage.tigris.dev", "my.bucket", false, true},
		{"http://minio.lan:9000", "my.bucket", false, false},
		{"http://10.1.2.3:9000", "bucket", false, true},
		{"http://[::1]:9000", "bucket", false, true},
		{"http://localhost:9000", "bucket", false, true},
		{"http://minio:9000", "bucket", false, true},
	} {
		got := objstore.Config{Endpoint: c.endpoint, Bucket: c.bucket, PathStyle: c.asked}.UsesPathStyle()
		if got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
