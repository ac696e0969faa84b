package ring_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/cloudcode-dev/cloudcode/nodeagent/ring"
)

func TestPosition(t *testing.T) {
	r := ring.New(1<<20, time.UnixMicro(1000))
	if p := r.Position(0); p != (ring.Position{First: 1000, Last: 999}) {
		t.Errorf("empty ring, new reader: %+v", p)
	}
	for range 3 {
		r.Append(ring.Event{})
	}
	for _, tt := range []struct {
		after uint64
		want  ring.Position
	}{
		{0, ring.Position{First: 1000, Last: 1002}},
		{999, ring.Position{First: 1000, Last: 1002}},
		{1001, ring.Position{First: 1002, Last: 1002}},
		{1002, ring.Position{First: 1003, Last: 1002}},
		{1003, ring.Position{First: 1000, Last: 1002, Gap: true}}, // of another ring
		{500, ring.Position{First: 1000, Last: 1002, Gap: true}},
	} {
		if got := r.Position(tt.after); got != tt.want {
			t.Errorf("Position(%d) = %+v, want %+v", tt.after, got, tt.want)
		}
	}
}

func TestReadWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := ring.New(1<<20, time.UnixMicro(1))
		got := make(chan []ring.Event)
		go func() {
			events, _, _ := r.Read(t.Context(), 1, 10)
			got <- events
		}()
		synctest.Wait()
		r.Append(ring.Event{Type: "a"})
		if e := <-got; len(e) != 1 || e[0].Type != "a" || e[0].Sequence != 1 {
			t.Errorf("read %+v", e)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := r.Read(ctx, 2, 10); err == nil {
			t.Error("Read ignored its context")
		}
	})
}

// Whatever is appended and however slowly it is read: a reader gets every number
// once, in order, and every hole is announced; the ring stays within its bound.
func TestReaderProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 5000).Draw(t, "limit")
		r := ring.New(limit, time.UnixMicro(100))
		next, appended := uint64(100), uint64(100)
		for range rapid.IntRange(1, 60).Draw(t, "rounds") {
			for range rapid.IntRange(0, 30).Draw(t, "appends") {
				r.Append(ring.Event{Frame: make([]byte, rapid.IntRange(0, 400).Draw(t, "size")), Type: fmt.Sprint(appended)})
				appended++
			}
			p := r.Position(0)
			if held := p.Last + 1 - p.First; held > 1 && held*128 > uint64(limit) {
				t.Fatalf("%d events held under a limit of %d bytes", held, limit)
			}
			if next == appended {
				continue
			}
			events, lost, err := r.Read(context.Background(), next, rapid.IntRange(1, 40).Draw(t, "most"))
			if err != nil || len(events) == 0 {
				t.Fatalf("Read = %v, %v", events, err)
			}
			if first := events[0].Sequence; (first != next) != lost {
				t.Fatalf("first %d, expected %d, lost %v", first, next, lost)
			}
			for i, e := range events {
				if e.Sequence != events[0].Sequence+uint64(i) || e.Type != fmt.Sprint(e.Sequence) {
					t.Fatalf("event %d is %+v", i, e)
				}
			}
			next = events[len(events)-1].Sequence + 1
		}
	})
}
