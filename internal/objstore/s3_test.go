package objstore

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// Tigris and R2 call their region auto; all others are asked for it.
func TestRegionAuto(t *testing.T) {
	for _, c := range []struct {
		endpoint, region string
		want             string // empty: to be asked for
	}{
		{"https://fly.storage.tigris.dev", "", "auto"},
		{"https://t3.storage.dev", "auto", "auto"},
		{"https://t3.storage.dev", "eu-1", "eu-1"},
		{"https://abc.r2.cloudflarestorage.com", "auto", "auto"},
		{"https://s3.amazonaws.com", "auto", ""},
		{"https://s3.amazonaws.com", "eu-west-1", "eu-west-1"},
		{"https://storage.dev.example", "", ""},
	} {
		s, err := open(Config{Endpoint: c.endpoint, Bucket: "bucket", Region: c.region})
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if cl := <-s.resolving; cl != nil {
			got = cl.region
		}
		if got != c.want || s.auto != (c.want == "") {
			t.Errorf("%s in %q: %q, to be asked for: %v", c.endpoint, c.region, got, s.auto)
		}
	}
}

// Without this header Tigris checks conditions against what its nearest region knows.
func TestTigrisConsistency(t *testing.T) {
	got := make(chan string, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("X-Tigris-Consistent")
	}))
	defer srv.Close()
	for tigris, want := range map[bool]string{true: "true", false: ""} {
		tr := newTransport(Config{Timeouts: Timeouts{Dial: time.Second, Header: time.Second, Stall: time.Second}}, tigris)
		defer tr.base.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, srv.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if h := <-got; h != want {
			t.Errorf("Tigris %v: header %q", tigris, h)
		}
	}
}

// A proxy would connect to whatever it is asked for.
func TestPublicOnlyHasNoProxy(t *testing.T) {
	if newTransport(Config{PublicOnly: true}, false).base.Proxy != nil || newTransport(Config{}, false).base.Proxy == nil {
		t.Error("the environment's proxy is for operators' endpoints, and for them alone")
	}
}
