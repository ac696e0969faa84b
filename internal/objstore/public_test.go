package objstore_test

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

func TestIsPublic(t *testing.T) {
	for _, a := range []string{
		"8.8.8.8", "100.63.255.255", "172.32.0.1", "::ffff:1.1.1.1", "2606:4700::1111", "2a00:1450:4001::5", "64:ff9b::808:808",
	} {
		if !objstore.IsPublic(netip.MustParseAddr(a)) {
			t.Errorf("%s is refused", a)
		}
	}
	for _, a := range []string{
		"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.0.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
		"100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1",
		"::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1",
		"64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "::7f00:1", "100::1",
	} {
		if objstore.IsPublic(netip.MustParseAddr(a)) {
			t.Errorf("%s is taken for a public address", a)
		}
	}
	if objstore.IsPublic(netip.Addr{}) {
		t.Error("no address at all is a public one")
	}
}

// A name that leads to this machine is refused where it is connected to, and
// nothing is sent. localhost stands for any name whose DNS answers as it likes.
func TestPublicOnly(t *testing.T) {
	var requests atomic.Int64
	good := fake(t, func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		_, _ = io.WriteString(w, `<ListBucketResult></ListBucketResult>`)
	})
	_, port, err := net.SplitHostPort(strings.TrimPrefix(good.Endpoint, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	good.Region = "us-east-1"
	if err := list(t.Context(), openStore(t, good)); err != nil || requests.Load() == 0 {
		t.Fatalf("%d requests, %v", requests.Load(), err)
	}
	requests.Store(0)
	for _, host := range []string{"127.0.0.1", "localhost", "[::ffff:127.0.0.1]"} {
		c := good
		c.Endpoint, c.PublicOnly, c.PathStyle = "http://"+host+":"+port, true, true
		s := openStore(t, c)
		wantErr(t, list(t.Context(), s), objstore.ErrNotAllowed, "127.0.0.1", "--own-storage=any")
		_, err := s.Put(t.Context(), "k", []byte("x"), objstore.PutOptions{})
		wantErr(t, err, objstore.ErrNotAllowed)
		c.Region = ""
		wantErr(t, list(t.Context(), openStore(t, c)), objstore.ErrNotAllowed)
		_, err = objstore.Region(t.Context(), c)
		wantErr(t, err, objstore.ErrNotAllowed)
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests reached it", n)
	}
}

// What a service says that is no S3 server is not for whoever named it as one.
func TestQuiet(t *testing.T) {
	const secret = "AKIA-OF-THE-MACHINE"
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"200":      func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, secret) },
		"404":      func(w http.ResponseWriter, _ *http.Request) { http.Error(w, secret, http.StatusNotFound) },
		"500":      func(w http.ResponseWriter, _ *http.Request) { http.Error(w, secret, http.StatusInternalServerError) },
		"503":      func(w http.ResponseWriter, _ *http.Request) { http.Error(w, secret, http.StatusServiceUnavailable) },
		"429":      func(w http.ResponseWriter, _ *http.Request) { http.Error(w, secret, http.StatusTooManyRequests) },
		"redirect": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/"+secret, http.StatusFound) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := fake(t, answer)
			loud := list(t.Context(), openStore(t, c))
			if loud == nil || !strings.Contains(loud.Error(), secret) && name != "429" {
				t.Errorf("whoever set it up is not told: %v", loud)
			}
			c.Quiet = true
			for _, region := range []string{"", "us-east-1"} {
				c.Region = region
				s := openStore(t, c)
				_, err := s.Put(t.Context(), "k", []byte("x"), objstore.PutOptions{})
				if e := list(t.Context(), s); e == nil || err == nil && name != "200" {
					t.Fatalf("list: %v, put: %v", e, err)
				} else if strings.Contains(e.Error(), secret) || err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("list: %v; put: %v", e, err)
				}
			}
		})
	}
	// An S3 server's own words are told.
	c := fake(t, func(w http.ResponseWriter, _ *http.Request) { s3Error(w, 500, "InternalError", "disk 3 is broken", "") })
	c.Quiet, c.Region = true, "us-east-1"
	wantErr(t, list(t.Context(), openStore(t, c)), objstore.ErrUnavailable, "disk 3 is broken")
}
