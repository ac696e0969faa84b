package objstore

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// transport bounds every wait of a request, and looks whether it is an S3 server
// that answers.
type transport struct {
	base   *http.Transport
	stall  time.Duration
	tigris bool
}

func newTransport(t Timeouts, tigris bool) *transport {
	dialer := net.Dialer{Timeout: t.Dial, KeepAlive: 15 * time.Second}
	return &transport{
		stall:  t.Stall,
		tigris: tigris,
		base: &http.Transport{
			Proxy: http.ProxyFromEnvironment,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := dialer.DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				return &stallConn{Conn: c, stall: t.Stall}, nil
			},
			TLSHandshakeTimeout:   t.Dial,
			ResponseHeaderTimeout: t.Header,
			ExpectContinueTimeout: time.Second,
			IdleConnTimeout:       time.Minute,
			MaxIdleConns:          64,
			MaxIdleConnsPerHost:   64,
			DisableCompression:    true, // content is what it is
		},
	}
}

// stallConn ends an upload that the other side does not take.
type stallConn struct {
	net.Conn
	stall time.Duration
}

func (c *stallConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

var errStalled = errors.New("the answer stopped coming")

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	req = req.Clone(ctx)
	if t.tigris {
		// Tigris is one bucket in many regions: conditions and reads must go by
		// what was written last anywhere. Not signed, as the signature is made already.
		req.Header.Set("X-Tigris-Consistent", "true")
	}
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp.Body = &stallBody{
		ReadCloser: resp.Body, ctx: ctx, cancel: cancel, stall: t.stall,
		timer: stoppedTimer(func() { cancel(errStalled) }),
	}
	if resp.StatusCode >= 300 || req.Method != http.MethodGet || asked(req) {
		resp.Body = &boundedBody{ReadCloser: resp.Body}
	}
	if err := checkS3(req, resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// asked: what comes back is not an object but a document about some.
func asked(req *http.Request) bool {
	q := req.URL.Query()
	return q.Has("list-type") || q.Has("location") || q.Has("delete")
}

const (
	// maxAnswer and maxTags bound a document: twice of what 1,000 objects with the
	// longest of keys, escaped, and all that is said of them need. Tags are bounded
	// because an empty one costs far more memory than bytes.
	maxAnswer = 8 << 20
	maxTags   = 100_000
)

var errAnswer = errors.New("its answer does not end")

// boundedBody ends a document that is longer than one can be.
type boundedBody struct {
	io.ReadCloser
	bytes, tags int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.bytes += n
	b.tags += bytes.Count(p[:n], []byte("<"))
	if b.bytes > maxAnswer || b.tags > maxTags {
		return 0, errAnswer
	}
	return n, err
}

func stoppedTimer(fn func()) *time.Timer {
	t := time.AfterFunc(time.Hour, fn)
	t.Stop()
	return t
}

// stallBody ends a download that stops.
type stallBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	stall  time.Duration
	timer  *time.Timer
}

func (b *stallBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.stall)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && err != io.EOF && context.Cause(b.ctx) == errStalled { //nolint:errorlint // as it was given
		err = errStalled
	}
	return n, err
}

func (b *stallBody) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// notS3Error: something answers at the endpoint, but it is no S3 server.
type notS3Error struct {
	status   int
	location string
	text     string
}

func (e *notS3Error) Error() string {
	switch {
	case e.location != "":
		return "it is no S3 server: it sends one to " + e.location
	case strings.Contains(strings.ToLower(e.text), "http request to an https server"):
		return "it wants https:// and not http://"
	}
	return fmt.Sprintf("it is no S3 server, or something in front of it answers: status %d and %q", e.status, e.text)
}

// roots of the documents that S3 servers send.
var roots = []string{"<Error", "ListBucketResult", "LocationConstraint", "DeleteResult"}

// checkS3 returns notS3Error for an answer that no S3 server gives: an error, or a
// list, that is not XML. Failures of a proxy in front of a server that is down
// are left to their status.
func checkS3(req *http.Request, resp *http.Response) error {
	list := asked(req)
	switch s := resp.StatusCode; {
	case s >= 500, s == http.StatusRequestTimeout, s == http.StatusTooManyRequests:
		return nil
	case s < 300 && !list, req.Method == http.MethodHead:
		return nil
	}
	r := bufio.NewReader(resp.Body)
	start, err := r.Peek(512)
	if err != nil && err != io.EOF { //nolint:errorlint // bare, by io.Reader's rules
		return err
	}
	text := bytes.TrimSpace(bytes.TrimPrefix(start, []byte("\xef\xbb\xbf")))
	xml := bytes.HasPrefix(text, []byte("<")) && slices.ContainsFunc(roots, func(r string) bool { return bytes.Contains(text, []byte(r)) })
	if xml || len(text) == 0 && !list {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{r, resp.Body}
		return nil
	}
	const enough = 80
	if len(text) > enough {
		text = text[:enough]
	}
	e := &notS3Error{status: resp.StatusCode, text: string(text)}
	if resp.StatusCode/100 == 3 {
		e.location = resp.Header.Get("Location")
	}
	return e
}
