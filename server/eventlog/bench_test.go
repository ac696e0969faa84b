package eventlog

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// BenchmarkFanOut gives events of the usual size to 1,000 subscribers of one feed;
// one operation is one event to all of them.
func BenchmarkFanOut(b *testing.B) {
	const subscribers, batch = 1000, 64
	l := &Log{limit: ringBytes}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	defer l.cancel()
	l.config.Session = func(*fleet.Session) *cloudcodev1.Session { return &cloudcodev1.Session{} }
	f := newFeed(l, "a", "u")
	close(f.ready)
	frame := []byte(strings.Repeat("x", 362))
	missed := make([]bool, subscribers)
	var started, ended sync.WaitGroup
	started.Add(subscribers)
	for i := range subscribers {
		ended.Go(func() {
			n := 0
			s := &subscriber{feed: f, session: &fleet.Session{}, foreign: false, resumed: true}
			s.yield = func(e *cloudcodev1.SessionEvent, _ error) bool {
				switch {
				case e.GetGap() != nil:
					missed[i] = true
				case e.GetHeartbeat() != nil && n == 0:
					started.Done()
				}
				n++
				return e.GetOpencode().GetType() != "last"
			}
			s.run(context.Background())
		})
	}
	started.Wait()
	b.ReportAllocs()
	b.ResetTimer()
	began := time.Now()
	for sent := 0; sent < b.N; sent += batch {
		entries := make([]*entry, 0, batch)
		for i := range min(batch, b.N-sent) {
			typ := "message.part.updated"
			if sent+i == b.N-1 {
				typ = "last"
			}
			entries = append(entries, f.ringEntry(&nodev1.RingEvent{Type: typ, Frame: frame, Time: timestamppb.Now()}, false))
		}
		f.update(func() {
			for i, e := range entries {
				f.pushRing(e, uint64(sent+i+1))
			}
		})
	}
	ended.Wait()
	b.StopTimer()
	slow := 0
	for _, m := range missed {
		if m {
			slow++
		}
	}
	b.ReportMetric(float64(b.N)*subscribers/time.Since(began).Seconds(), "deliveries/s")
	b.ReportMetric(float64(slow), "fell-behind")
}
