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
	"github.com/cloudcode-dev/cloudcode/server/store"
)

func TestErrors(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		_, err := f.first("b", "")
		errorIs(f.T, err, fleet.ErrNotFound)
		good := cursor{1, 2, 3}.id(tagOf("u1"))
		for _, after := range []string{"x", "1", "1-2", "1-2.3", "1-2.3.", "1-2.3.xyz", "-1-2.3.00000000", "1-99999999999999999999.3.00000000", good + " ", strings.Repeat("9", 1000)} {
			_, err := f.first("a", after)
			errorIs(f.T, err, fleet.ErrInvalidArgument)
			if err != nil && len(err.Error()) > 300 {
				f.Errorf("error of %d bytes", len(err.Error()))
			}
		}
		if _, err := f.first("a", good); err != nil {
			f.Errorf("%s: %v", good, err)
		}
	})
}

func TestIDs(t *testing.T) {
	for _, c := range []cursor{{}, {1, 2, 3}, {1<<64 - 1, 1<<64 - 1, 1<<64 - 1}} {
		got, tag, err := parseID(c.id(tagOf("u")))
		if err != nil || got != c || tag != tagOf("u") {
			t.Errorf("%+v became %+v, %q, %v", c, got, tag, err)
		}
	}
}

func TestFromNowOn(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		f.nodes["n1"].emit("old1", "old2")
		r := f.subscribe("a", "")
		synctest.Wait()
		if got := name(r.got()[0]); got != "HEARTBEAT" {
			f.Errorf("the first event is %s", got)
		}
		f.want(r, "L:RUNNING:")
		f.nodes["n1"].emit("new1")
		synctest.Wait()
		f.change("a", "m")
		synctest.Wait()
		f.nodes["n1"].emit("new2")
		f.want(r, "L:RUNNING:", "new1", "L:RUNNING:m", "new2")
		if r.got()[1].GetLifecycle().GetSession().GetName() != "sessions/a" {
			f.Errorf("first lifecycle event: %v", r.got()[1])
		}
		r.stop()
	})
}

func TestHeartbeats(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		r := f.subscribe("a", "")
		wait(heartbeat / 2)
		f.nodes["n1"].emit("e")
		wait(heartbeat - time.Millisecond)
		if len(r.got()) != 3 {
			f.Fatalf("%d events, the idle time has not passed: %v", len(r.got()), r.got())
		}
		wait(2 * time.Millisecond)
		if len(r.got()) != 4 || name(r.got()[3]) != "HEARTBEAT" || r.got()[3].GetId() != r.got()[2].GetId() {
			f.Fatalf("no heartbeat with the id of the event before: %v", r.got())
		}
		wait(10 * heartbeat)
		if n := len(r.got()); n != 14 {
			f.Errorf("%d events after 10 more periods, want 14", n)
		}
		r.stop()
	})
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

// TestSlowReader: it is told what it missed, and neither delays the others nor
// makes the feed hold more.
func TestSlowReader(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.limit = 100 * (overhead + 7)
		f.restartServer()
		f.create("a", "u1")
		slow, fast := f.subscribe("a", ""), f.subscribe("a", "")
		synctest.Wait()
		slow.mu.Lock()
		slow.paused = make(chan struct{})
		slow.mu.Unlock()
		want := []string{"L:RUNNING:"}
		for i := range 5000 {
			f.nodes["n1"].emit(fmt.Sprint(i))
			want = append(want, fmt.Sprint(i))
			synctest.Wait()
		}
		f.want(fast, want...)
		f.log().mu.Lock()
		feed := f.log().feeds["a"]
		f.log().mu.Unlock()
		feed.mu.Lock()
		if feed.bytes > f.limit || len(feed.entries) > 100 {
			f.Errorf("the feed holds %d events of %d bytes", len(feed.entries), feed.bytes)
		}
		feed.mu.Unlock()

		slow.mu.Lock()
		close(slow.paused)
		slow.paused = nil
		slow.mu.Unlock()
		got := slow.names()
		gap := slices.Index(got, "GAP")
		if gap < 0 || slices.Contains(got[gap+1:], "GAP") {
			f.Fatalf("not exactly one gap: %q", got)
		}
		if n := len(got) - gap - 1; n < 90 || !slices.Equal(got[gap+1:], want[len(want)-n:]) {
			f.Errorf("after the gap: %q", got[gap+1:])
		}
		if !slices.Equal(got[:gap], want[:gap]) {
			f.Errorf("before the gap: %q", got[:gap])
		}
		slow.stop()
		fast.stop()
	})
}

func TestGaps(t *testing.T) {
	t.Run("the node forgot", func(t *testing.T) {
		bubble(t, func(f *fixture) {
			f.create("a", "u1")
			n := f.nodes["n1"]
			r := f.subscribe("a", "")
			synctest.Wait()
			n.emit("1")
			synctest.Wait()
			id := r.stop()
			wait(linger + time.Second)
			n.emit("2", "3", "4")
			n.forget(2)
			r = f.subscribe("a", id)
			f.want(r, "GAP", "3", "4")
			r.stop()
			// All of them, and nothing follows: said at once.
			wait(linger + time.Second)
			n.forget(2)
			r = f.subscribe("a", id)
			f.want(r, "GAP")
			id = r.stop()
			r = f.subscribe("a", id)
			f.want(r)
			n.emit("5")
			f.want(r, "5")
			r.stop()
		})
	})
	t.Run("the node daemon was restarted", func(t *testing.T) {
		bubble(t, func(f *fixture) {
			f.create("a", "u1")
			n := f.nodes["n1"]
			r := f.subscribe("a", "")
			synctest.Wait()
			n.emit("1")
			synctest.Wait()
			n.restart(1_000_000)
			wait(5 * time.Second)
			n.emit("2")
			f.want(r, "L:RUNNING:", "1", "GAP", "2")
			for i, want := range [][]string{{"1", "GAP", "2"}, {"GAP", "2"}, {"2"}, {}} {
				var ids []string
				for _, e := range r.got() {
					if name(e) != "HEARTBEAT" {
						ids = append(ids, e.GetId())
					}
				}
				again := f.subscribe("a", ids[i])
				f.want(again, want...)
				again.stop()
			}
			r.stop()
		})
	})
	t.Run("the node's clock was set back", func(t *testing.T) {
		bubble(t, func(f *fixture) {
			f.create("a", "u1")
			n := f.nodes["n1"]
			r := f.subscribe("a", "")
			synctest.Wait()
			n.emit("1", "2", "3")
			synctest.Wait()
			n.restart(500)
			n.emit("4")
			wait(5 * time.Second)
			n.emit("5")
			f.want(r, "L:RUNNING:", "1", "2", "3", "GAP", "4", "5")
			id := r.stop()
			n.emit("6")
			r = f.subscribe("a", id)
			f.want(r, "6")
			r.stop()
			old := cursor{1, 1_002, 1}.id(tagOf("u1"))
			r = f.subscribe("a", old)
			f.want(r, "GAP", "4", "5", "6")
			r.stop()
		})
	})
	t.Run("the node missed some itself", func(t *testing.T) {
		bubble(t, func(f *fixture) {
			f.create("a", "u1")
			r := f.subscribe("a", "")
			synctest.Wait()
			f.nodes["n1"].emit("1", typeGap, "2")
			f.want(r, "L:RUNNING:", "1", "GAP", "2")
			r.stop()
		})
	})
	t.Run("an id of an older session", func(t *testing.T) {
		bubble(t, func(f *fixture) {
			f.create("a", "u1")
			r := f.subscribe("a", "")
			synctest.Wait()
			id := r.stop()
			f.remove("a")
			f.nodes["n1"].restart(5_000)
			f.create("a", "u2")
			f.nodes["n1"].emit("1")
			r = f.subscribe("a", id)
			f.want(r, "GAP", "L:RUNNING:", "1")
			r.stop()
		})
	})
	t.Run("the store dropped lifecycle events", func(t *testing.T) {
		bubble(t, func(f *fixture) {
			f.create("a", "u1")
			r := f.subscribe("a", "")
			synctest.Wait()
			id := r.stop()
			wait(linger + time.Second)
			for i := range store.EventsKept + 10 {
				f.change("a", fmt.Sprint(i))
			}
			r = f.subscribe("a", id)
			got := r.names()
			if len(got) != store.EventsKept+1 || got[0] != "GAP" || got[1] != "L:RUNNING:10" {
				f.Errorf("%d events, first %q", len(got), got[:2])
			}
			r.stop()
		})
	})
}

func TestNodeAway(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		n := f.nodes["n1"]
		n.emit("old")
		n.link(false)
		wait(time.Minute)
		r := f.subscribe("a", "")
		f.want(r, "L:RUNNING:")
		f.change("a", "lost", func(s *fleet.Session) { s.State = fleet.StateLost })
		f.want(r, "L:RUNNING:", "L:LOST:lost")
		wait(10 * time.Second)
		n.emit("while away")
		n.link(true)
		wait(5 * time.Second)
		f.want(r, "L:RUNNING:", "L:LOST:lost", "while away")
		id := r.got()[len(r.got())-1].GetId()
		n.link(false)
		n.emit("again")
		again := f.subscribe("a", id)
		f.want(again)
		wait(time.Minute)
		n.link(true)
		wait(5 * time.Second)
		f.want(r, "L:RUNNING:", "L:LOST:lost", "while away", "again")
		f.want(again, "again")
		r.stop()
		again.stop()
	})
}

// TestResumeWhileNodeAway: lifecycle events come at once, OpenCode's later, each once.
func TestResumeWhileNodeAway(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		n := f.nodes["n1"]
		r := f.subscribe("a", "")
		synctest.Wait()
		n.emit("1")
		synctest.Wait()
		id := r.stop()
		f.restartServer()
		n.emit("2")
		n.link(false)
		f.change("a", "x")
		r = f.subscribe("a", id)
		f.want(r, "L:RUNNING:x")
		id = r.stop()
		r = f.subscribe("a", id)
		f.want(r)
		n.link(true)
		wait(5 * time.Second)
		f.want(r, "2")
		r.stop()
	})
}

func TestNotOnTheNodeYet(t *testing.T) {
	bubble(t, func(f *fixture) {
		n := f.nodes["n1"]
		n.has = false
		f.update(func(tx store.Tx) error {
			return putEvent(tx, &fleet.Session{ID: "a", UID: "u1", State: fleet.StatePending})
		})
		r := f.subscribe("a", "")
		f.want(r, "L:PENDING:")
		f.change("a", "", func(s *fleet.Session) {
			s.State, s.Generation = fleet.StateStarting, 1
			s.Assignment = &fleet.Assignment{Node: "n1", Generation: 1}
		})
		late := f.subscribe("a", "")
		wait(time.Second)
		n.mu.Lock()
		n.has = true
		n.mu.Unlock()
		n.emit("1")
		wait(5 * time.Second)
		f.want(r, "L:PENDING:", "L:STARTING:", "1")
		f.want(late, "L:STARTING:", "1")
		r.stop()
		late.stop()
	})
}

func TestGenerations(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		r := f.subscribe("a", "")
		synctest.Wait()
		f.nodes["n1"].emit("1")
		synctest.Wait()
		next := func(node string) func(*fleet.Session) {
			return func(s *fleet.Session) {
				s.Generation++
				s.Assignment.Generation, s.Assignment.Node = s.Generation, node
			}
		}
		f.change("a", "same node", next("n1"))
		synctest.Wait()
		f.nodes["n1"].emit("2")
		f.want(r, "L:RUNNING:", "1", "L:RUNNING:same node", "2")
		if id := r.got()[len(r.got())-1].GetId(); !strings.HasPrefix(id, "2-") {
			f.Errorf("id %s is not of generation 2", id)
		}
		// Another node has a ring of its own.
		f.nodes["n2"].restart(2_000_000)
		f.change("a", "other node", next("n2"))
		synctest.Wait()
		f.nodes["n1"].emit("not any more")
		f.nodes["n2"].emit("3")
		f.want(r, "L:RUNNING:", "1", "L:RUNNING:same node", "2", "L:RUNNING:other node", "GAP", "3")
		if n := f.nodes["n1"].open(); n != 0 {
			f.Errorf("%d streams to the old node", n)
		}
		r.stop()
	})
}

func TestDeleted(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		f.create("b", "u2")
		told, silent := f.subscribe("a", ""), f.subscribe("b", "")
		synctest.Wait()
		deleting := func(s *fleet.Session) { s.State, s.Deleting = fleet.StateDeleting, true }
		f.change("a", "", deleting)
		f.remove("a")
		f.remove("b")
		f.want(told, "L:RUNNING:", "L:DELETING:", "END:DELETED")
		f.want(silent, "L:RUNNING:", "L:DELETING:", "END:DELETED")
		<-told.done
		<-silent.done
		// Made and removed in one go, under the id that was just used.
		f.create("a", "u3")
		r := f.subscribe("a", "")
		f.want(r, "L:RUNNING:")
		f.update(func(tx store.Tx) error {
			if err := tx.DeleteSession("a"); err != nil {
				return err
			}
			return putEvent(tx, &fleet.Session{ID: "a", UID: "u4", State: fleet.StatePending})
		})
		f.want(r, "L:RUNNING:", "L:DELETING:", "END:DELETED")
		r2 := f.subscribe("a", "")
		f.want(r2, "L:PENDING:")
		r.stop()
		r2.stop()
	})
}

// TestOnlyWhileSomebodyListens: the node is left alone otherwise.
func TestOnlyWhileSomebodyListens(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		n := f.nodes["n1"]
		wait(time.Minute)
		if n.opened != 0 {
			t.Error("pulled although nobody listens")
		}
		r1, r2 := f.subscribe("a", ""), f.subscribe("a", "")
		synctest.Wait()
		r1.stop()
		wait(2 * linger)
		r2.stop()
		f.change("a", "does not prolong it")
		wait(linger - time.Second)
		if got := n.open(); got != 1 || n.opened != 1 {
			f.Errorf("%d streams, %d were opened, want one for two subscribers", got, n.opened)
		}
		wait(2 * time.Second)
		if got := n.open(); got != 0 {
			f.Errorf("%d streams after nobody listened for %v", got, linger)
		}
		f.log().mu.Lock()
		if len(f.log().feeds) != 0 {
			f.Error("the feed is still there")
		}
		f.log().mu.Unlock()
	})
}

func TestClose(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		r := f.subscribe("a", "")
		synctest.Wait()
		f.log().Close()
		<-r.done
		errorIs(f.T, r.err, fleet.ErrUnavailable)
		_, err := f.first("a", "")
		errorIs(f.T, err, fleet.ErrUnavailable)
	})
}

// TestWatcherFallsBehind: the store no longer holds what the Log has not seen.
func TestWatcherFallsBehind(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		r := f.subscribe("a", "")
		synctest.Wait()
		// One transaction larger than what the store keeps for watchers.
		f.update(func(tx store.Tx) error {
			s, err := tx.Session("a")
			if err != nil {
				return err
			}
			for i := range 12_000 {
				s.Message = fmt.Sprint(i)
				if i < 11_990 {
					err = tx.PutSession(s)
				} else {
					err = putEvent(tx, s)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		want := []string{"L:RUNNING:"}
		for i := 11_990; i < 12_000; i++ {
			want = append(want, fmt.Sprint("L:RUNNING:", i))
		}
		wait(5 * time.Second)
		f.want(r, want...)
		r.stop()
	})
}
