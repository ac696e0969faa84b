package fleettest_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/fleettest"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// BenchmarkSmallRequests is what gateway, link and node daemon cost, all in one
// process, with an upstream in memory. Compare with `make bench`, which has real
// parts.
func BenchmarkSmallRequests(b *testing.B) {
	f := fleettest.New(b)
	f.AddNode("n1")
	f.Create("s1", nil)
	f.AwaitState("s1", cloudcodev1.Session_RUNNING)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", f.Gateway.Addr())
	}}}
	defer client.CloseIdleConnections()
	b.SetParallelism(8)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			resp, err := client.Get(f.URL("s1", "/x"))
			if err != nil {
				b.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				b.Error(resp.Status)
				return
			}
		}
	})
}
