package eventlog

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func TestIDs(t *testing.T) {
	for _, c := range []cursor{{}, {1, 2, 3}, {1<<64 - 1, 1<<64 - 1, 1<<64 - 1}} {
		got, tag, err := parseID(c.id(tagOf("u")))
		if err != nil || got != c || tag != tagOf("u") {
			t.Errorf("%+v became %+v, %q, %v", c, got, tag, err)
		}
	}
}

func TestResumeMergesByTime(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		r := f.subscribe("a", "")
		synctest.Wait()
		id := r.stop()
		var want []string
		for i := range 20 {
			wait(time.Second)
			if i%3 == 0 {
				f.change("a", fmt.Sprint(i))
				want = append(want, fmt.Sprint("L:RUNNING:", i))
			} else {
				f.nodes["n1"].emit(fmt.Sprint(i))
				want = append(want, fmt.Sprint(i))
			}
		}
		wait(linger + time.Second) // the feed is gone: all comes from the sources
		r = f.subscribe("a", id)
		f.want(r, want...)
		// From every id of what came, exactly what follows, also after a restart.
		var ids []string
		for _, e := range r.got()[1:] {
			ids = append(ids, e.GetId())
		}
		r.stop()
		for round := range 2 {
			for i, id := range ids {
				r := f.subscribe("a", id)
				if got := r.names(); !slices.Equal(got, want[i+1:]) {
					f.Errorf("round %d, behind %d: %q, want %q", round, i, got, want[i+1:])
				}
				r.stop()
			}
			f.restartServer()
		}
	})
}

// TestCursorBesideTheFeed resumes from where the feed itself never was, because
// the two sources came in another order when the id was made.
func TestCursorBesideTheFeed(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		n := f.nodes["n1"]
		first := n.first
		n.emit("1")
		wait(time.Second)
		f.change("a", "x") // lifecycle 2
		wait(time.Second)
		n.emit("2", "3")
		tag := tagOf("u1")
		for _, tt := range []struct {
			at   cursor
			want []string
		}{
			{cursor{1, first + 1, 1}, []string{"L:RUNNING:x", "3"}}, // had 1, 2, not x
			{cursor{1, first - 1, 2}, []string{"1", "2", "3"}},      // had x, not 1
			{cursor{1, first + 2, 1}, []string{"L:RUNNING:x"}},
			{cursor{1, first + 2, 2}, nil},
		} {
			r := f.subscribe("a", tt.at.id(tag))
			f.want(r, tt.want...)
			// The ids given on the way must work as well.
			var ids []string
			for _, e := range r.got()[1:] {
				ids = append(ids, e.GetId())
			}
			r.stop()
			for i, id := range ids {
				r := f.subscribe("a", id)
				f.want(r, tt.want[i+1:]...)
				r.stop()
			}
		}
	})
}

// TestDropsAndResumes is the promise of event ids: who drops at random hundreds
// of times sees what one sees who never dropped.
func TestDropsAndResumes(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarts=%v", restarts), func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			bubble(t, func(f *fixture) { dropsAndResumes(f, rand.New(rand.NewPCG(seed, 1)), restarts) })
		})
	}
}

func dropsAndResumes(f *fixture, rnd *rand.Rand, restarts bool) {
	f.create("a", "u1")
	n := f.nodes["n1"]
	steady := f.subscribe("a", "")
	synctest.Wait()
	id := steady.got()[1].GetId()

	var flaky []string
	reconnects := 0
	done := make(chan struct{})
	drop := rand.New(rand.NewPCG(rnd.Uint64(), 2)) // of its own: used by another goroutine
	go func() {
		defer close(done)
		for {
			left := drop.IntN(8)
			for e, err := range f.log().Subscribe(f.Context(), "a", id) {
				if err != nil {
					if restarts {
						break
					}
					f.Errorf("flaky subscriber: %v", err)
					return
				}
				id = e.GetId()
				if got := name(e); got != "HEARTBEAT" {
					flaky = append(flaky, got)
					if got == "final" {
						return
					}
				}
				if left--; left < 0 {
					break
				}
			}
			reconnects++
			time.Sleep(time.Duration(drop.IntN(50)) * time.Millisecond)
		}
	}()
	var sent []string
	for i := range 2000 {
		switch k := rnd.IntN(20); {
		case k < 3:
			f.change("a", fmt.Sprint(i))
			sent = append(sent, fmt.Sprint("L:RUNNING:", i))
		case k == 3:
			n.breakStreams()
		case k == 4:
			time.Sleep(time.Duration(rnd.IntN(2000)) * time.Millisecond)
		case k == 5 && i%50 == 0:
			f.change("a", fmt.Sprint(i), func(s *fleet.Session) { s.Generation++; s.Assignment.Generation++ })
			sent = append(sent, fmt.Sprint("L:RUNNING:", i))
		case k == 6 && restarts && i%20 == 0:
			f.log().Close()
			f.start()
		default:
			n.emit(fmt.Sprint(i))
			sent = append(sent, fmt.Sprint(i))
		}
		if rnd.IntN(3) == 0 {
			time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
		}
	}
	time.Sleep(20 * time.Second)
	n.emit("final")
	sent = append(sent, "final")
	<-done
	if reconnects < 200 {
		f.Errorf("only %d reconnects", reconnects)
	}
	if slices.Contains(flaky, "GAP") {
		f.Error("there is a gap, although all is held")
	}
	if !restarts {
		got := steady.names()[1:]
		if !slices.Equal(got, flaky) {
			f.Errorf("who never dropped got %d, who dropped %d times got %d", len(got), reconnects, len(flaky))
			diff(f.T, got, flaky)
		}
	}
	// Each once, and in the order of its source.
	for _, lifecycle := range []bool{true, false} {
		other := func(s string) bool { return strings.HasPrefix(s, "L:") != lifecycle }
		got := slices.DeleteFunc(slices.Clone(flaky), other)
		want := slices.DeleteFunc(slices.Clone(sent), other)
		if !slices.Equal(got, want) {
			f.Errorf("lifecycle=%v: got %d, sent %d", lifecycle, len(got), len(want))
			diff(f.T, want, got)
		}
	}
	f.Logf("%d events, %d reconnects", len(flaky), reconnects)
	steady.cancel()
	<-steady.done
}

func diff(t *testing.T, want, got []string) {
	t.Helper()
	for i := range max(len(want), len(got)) {
		if i >= len(want) || i >= len(got) || want[i] != got[i] {
			from := max(0, i-3)
			t.Errorf("differ at %d: want %q, got %q", i, want[from:min(len(want), i+5)], got[from:min(len(got), i+5)])
			return
		}
	}
}
