package eventlog

import (
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

// What a node says of a checkpoint is no event of OpenCode, and stands in order
// with those.
func TestCheckpointed(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.create("a", "u1")
		n := f.nodes["n1"]
		r := f.subscribe("a", "")
		synctest.Wait()
		n.emit("session.idle")
		n.emitFrame("cloudcode.checkpointed", `{"id":"c1","trigger":"turn","files":"7","fieldOfLater":1}`)
		n.emit("next")
		n.emitFrame("cloudcode.checkpointed", `{`)
		f.want(r, "L:RUNNING:", "session.idle", "CHECKPOINT:c1:turn", "next", "CHECKPOINT::")
		if c := r.got()[3].GetCheckpointed().GetCheckpoint(); c.GetFiles() != 7 {
			f.Errorf("checkpoint %v", c)
		}
		// It is replayed like the others.
		after := r.got()[2].GetId()
		r.stop()
		again := f.subscribe("a", after)
		f.want(again, "CHECKPOINT:c1:turn", "next", "CHECKPOINT::")
		again.stop()
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
