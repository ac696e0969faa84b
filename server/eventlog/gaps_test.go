package eventlog

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloudcode-dev/cloudcode/server/store"
)

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
