package containerd

import (
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
)

// BenchmarkLifecycle measures one session of a ready image: Ensure until it
// runs, Dial, and Stop of a process that heeds SIGTERM.
func BenchmarkLifecycle(b *testing.B) {
	e := newEnv(b)
	e.importImage(b, testImage)
	ctx := testContext(b)
	var ensure, dial, stop time.Duration
	const dials = 20
	for b.Loop() {
		start := time.Now()
		if _, err := e.Ensure(ctx, e.spec("bench", "serve", "8080"), nil); err != nil {
			b.Fatal(err)
		}
		ensure += time.Since(start)
		e.mustAsk(b, "bench", "/")

		start = time.Now()
		for range dials {
			c, err := e.Dial(ctx, "bench", runtimetest.Port)
			if err != nil {
				b.Fatal(err)
			}
			_ = c.Close()
		}
		dial += time.Since(start)

		start = time.Now()
		if err := e.Stop(ctx, "bench", 10*time.Second); err != nil {
			b.Fatal(err)
		}
		stop += time.Since(start)
	}
	b.ReportMetric(float64(ensure.Milliseconds())/float64(b.N), "ensure-ms/op")
	b.ReportMetric(float64(dial.Microseconds())/float64(b.N*dials), "dial-µs/op")
	b.ReportMetric(float64(stop.Milliseconds())/float64(b.N), "stop-ms/op")
}
