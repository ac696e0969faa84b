package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

// running starts a Reconciler in a bubble of virtual time.
func running(t *testing.T, wrap func(store.Store) store.Store, fn func(t *testing.T, s store.Store)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, err := boltstore.Open(filepath.Join(dir, "fleet.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		seen := store.Store(s)
		if wrap != nil {
			seen = wrap(s)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- New(seen, slog.New(slog.DiscardHandler)).Run(ctx) }()
		fn(t, s)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func put(t *testing.T, s store.Store, things ...any) {
	t.Helper()
	if _, err := s.Update(t.Context(), func(tx store.Tx) error {
		for _, thing := range things {
			var err error
			switch v := thing.(type) {
			case *fleet.Session:
				err = tx.PutSession(v)
			case *fleet.Node:
				err = tx.PutNode(v)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s store.Store, id string) (sess *fleet.Session) {
	t.Helper()
	if err := s.View(t.Context(), func(tx store.ReadTx) (err error) {
		sess, err = tx.Session(id)
		if errors.Is(err, fleet.ErrNotFound) {
			return nil
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return sess
}

func events(t *testing.T, s store.Store, uid string) (got []string) {
	t.Helper()
	if err := s.View(t.Context(), func(tx store.ReadTx) error {
		for e, err := range tx.Events(uid, 0) {
			if err != nil {
				return err
			}
			got = append(got, string(e.Session.State)+" "+e.Session.Reason)
			if a := e.Session.Assignment; a != nil && a.Password != "" {
				t.Error("an event holds the password")
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestRunFollowsTheStore(t *testing.T) {
	running(t, nil, func(t *testing.T, s store.Store) {
		put(t, s, pending("a"))
		synctest.Wait()
		if got := get(t, s, "a"); got.State != fleet.StatePending || got.Reason != fleet.ReasonNoNodes {
			t.Fatalf("without nodes: %s %s", got.State, got.Reason)
		}
		put(t, s, ready("n1"), ready("n2"))
		synctest.Wait()
		first := get(t, s, "a")
		if first.State != fleet.StateStarting || first.Reason != "" || first.Generation != 1 || first.Assignment.Node != "n1" ||
			len(first.Assignment.Password) < 20 || first.Progress.Phase != "placed" {
			t.Fatalf("placed: %+v, %+v", first, first.Assignment)
		}
		put(t, s, pending("b"))
		synctest.Wait()
		if b := get(t, s, "b"); b.Assignment.Node != "n2" || b.Assignment.Password == first.Assignment.Password {
			t.Fatalf("second: %+v", b.Assignment)
		}
		put(t, s, away("n1"))
		synctest.Wait()
		if got := get(t, s, "a"); got.State != fleet.StateLost || got.Assignment.Node != "n1" {
			t.Fatalf("node away: %s on %+v", got.State, got.Assignment)
		}
		put(t, s, ready("n1"))
		synctest.Wait()
		changed := get(t, s, "a")
		if changed.State != fleet.StateStarting || changed.Generation != 1 {
			t.Fatalf("node back: %s, generation %d", changed.State, changed.Generation)
		}
		changed.Spec.Image = "new"
		put(t, s, changed)
		synctest.Wait()
		got := get(t, s, "a")
		if got.Generation != 2 || got.Assignment.Generation != 2 || got.Assignment.Spec.Image != "new" || got.Assignment.Password != first.Assignment.Password {
			t.Fatalf("new spec: %+v", got.Assignment)
		}
		got.Deleting, got.State = true, fleet.StateDeleting
		put(t, s, got)
		synctest.Wait()
		got = get(t, s, "a")
		if !got.Assignment.Delete || got.Generation != 2 {
			t.Fatalf("deleting: %+v", got.Assignment)
		}
		if got, want := events(t, s, got.UID), []string{
			"PENDING NO_NODES", "STARTING ", "LOST NODE_UNREACHABLE", "STARTING NODE_RETURNED", "STARTING ", "DELETING ",
		}; !equal(got, want) {
			t.Errorf("events %q, want %q", got, want)
		}
		got.Assignment = nil
		put(t, s, got)
		synctest.Wait()
		if got := get(t, s, "a"); got != nil {
			t.Fatalf("still there: %+v", got)
		}
	})
}

func equal(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// failing refuses writes while it is told to.
type failing struct {
	store.Store
	down  atomic.Bool
	tries atomic.Int32
}

func (f *failing) Update(ctx context.Context, fn func(store.Tx) error) (store.Revision, error) {
	f.tries.Add(1)
	if f.down.Load() {
		return 0, fleet.ErrResourceExhausted
	}
	return f.Store.Update(ctx, fn)
}

func TestRunTriesAgain(t *testing.T) {
	f := &failing{}
	f.down.Store(true)
	running(t, func(s store.Store) store.Store { f.Store = s; return f }, func(t *testing.T, s store.Store) {
		put(t, s, pending("a"), ready("n1"))
		start := time.Now()
		time.Sleep(10 * time.Minute) // virtual
		synctest.Wait()
		if n := f.tries.Load(); n < 20 || n > 40 {
			t.Errorf("%d tries in %v: pauses should grow to %v", n, time.Since(start), retryMax)
		}
		f.down.Store(false)
		time.Sleep(retryMax)
		synctest.Wait()
		if got := get(t, s, "a"); got.State != fleet.StateStarting {
			t.Errorf("with room again: %s", got.State)
		}
	})
}

func TestApplyRefusesOldPlans(t *testing.T) {
	s, err := boltstore.Open(filepath.Join(t.TempDir(), "fleet.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := New(s, slog.New(slog.DiscardHandler))
	sess, node := pending("a"), ready("n1")
	put(t, s, sess, node)
	plan := func() Action {
		return Plan(Snapshot{Sessions: []*fleet.Session{get(t, s, "a")}, Nodes: []*fleet.Node{ready("n1")}}, time.Now())[0]
	}
	for name, meanwhile := range map[string]any{
		"session changed":  with(pending("a"), func(s *fleet.Session) { s.Labels = map[string]string{"a": "b"} }),
		"session replaced": with(pending("a"), func(s *fleet.Session) { s.UID = "other" }),
		"node went away":   away("n1"),
	} {
		put(t, s, pending("a"), ready("n1"))
		a := plan()
		put(t, s, meanwhile)
		if _, err := r.Apply(t.Context(), a); !errors.Is(err, fleet.ErrAborted) {
			t.Errorf("%s: %v", name, err)
		}
		if got := get(t, s, "a"); got.Assignment != nil {
			t.Errorf("%s: placed all the same", name)
		}
	}
}

// A node that is back has said, or says now, how its sessions are, and does not
// say so twice: LOST after that would leave the session waiting for ever.
func TestApplyDoesNotLoseSessionsOfANodeThatIsBack(t *testing.T) {
	s, err := boltstore.Open(filepath.Join(t.TempDir(), "fleet.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := New(s, slog.New(slog.DiscardHandler))
	for name, change := range map[string]func(*fleet.Session){
		"runs":     func(*fleet.Session) {},
		"new spec": func(s *fleet.Session) { s.Spec.Image = "new" },
	} {
		sess := with(pending("a"), func(s *fleet.Session) {
			s.State, s.Generation = fleet.StateRunning, 1
			s.Assignment = &fleet.Assignment{Node: "n1", Generation: 1, Spec: s.Spec.Clone()}
			change(s)
		})
		put(t, s, sess, away("n1"))
		plan := Plan(Snapshot{Sessions: []*fleet.Session{get(t, s, "a")}, Nodes: []*fleet.Node{away("n1")}}, time.Now())
		if len(plan) != 1 || plan[0].State != fleet.StateLost {
			t.Fatalf("%s: plan %+v", name, plan)
		}
		put(t, s, ready("n1"))
		if _, err := r.Apply(t.Context(), plan[0]); !errors.Is(err, fleet.ErrAborted) {
			t.Errorf("%s: %v", name, err)
		}
		if got := get(t, s, "a"); got.State != fleet.StateRunning {
			t.Errorf("%s: %s", name, got.State)
		}
		put(t, s, away("n1"))
		if _, err := r.Apply(t.Context(), plan[0]); err != nil {
			t.Errorf("%s: the node is away again: %v", name, err)
		}
	}
}

// A restore is one request in every generation that carries it: its node may have
// done it although we never heard so. Asked for again it is another one.
func TestRestoreStaysOneRequest(t *testing.T) {
	running(t, nil, func(t *testing.T, s store.Store) {
		put(t, s, ready("n1"), with(pending("a"), func(s *fleet.Session) { s.Spec.Storage.Mode = fleet.ModeSnapshot }))
		synctest.Wait()
		change := func(fn func(*fleet.Session) error) *fleet.Session {
			t.Helper()
			sess := get(t, s, "a")
			if err := fn(sess); err != nil {
				t.Fatal(err)
			}
			put(t, s, sess)
			synctest.Wait()
			return get(t, s, "a")
		}
		runs := func(s *fleet.Session) error {
			_, err := s.ApplyReport(fleet.Report{SessionUID: s.UID, Generation: s.Generation, State: fleet.ReportedRunning}, s.Assignment.Node, time.Now())
			return err
		}
		restore := func(s *fleet.Session) error { return s.Restore("c1", time.Now()) }
		change(runs)
		if got := change(restore); got.Generation != 2 || got.Assignment.RestoreCheckpoint != "c1" || got.Assignment.RestoreGeneration != 2 {
			t.Fatalf("asked: %+v", got.Assignment)
		}
		put(t, s, away("n1"), ready("n2"))
		synctest.Wait()
		got := change(func(s *fleet.Session) error { return s.Resume(time.Now()) })
		if got.Generation != 3 || got.Assignment.Node != "n2" || got.Assignment.RestoreCheckpoint != "c1" || got.Assignment.RestoreGeneration != 2 {
			t.Fatalf("on another node: %+v", got.Assignment)
		}
		if got := change(runs); got.RestoreCheckpoint != "" || got.RestoreGeneration != 0 || got.Assignment.RestoreGeneration != 0 {
			t.Fatalf("it runs: %+v, %+v", got, got.Assignment)
		}
		if got := change(restore); got.Generation != 4 || got.Assignment.RestoreCheckpoint != "c1" || got.Assignment.RestoreGeneration != 4 {
			t.Fatalf("asked again: %+v", got.Assignment)
		}
		// While it is suspended, before its node has heard of it: another one.
		change(func(s *fleet.Session) error { return s.Suspend(time.Now()) })
		if got := change(restore); got.Generation != 5 || got.Assignment.Suspend || got.Assignment.RestoreGeneration != 5 {
			t.Fatalf("asked once more: %+v", got.Assignment)
		}
	})
}
