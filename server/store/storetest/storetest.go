// Package storetest is the conformance suite of store.Store: every
// implementation passes it.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// Open returns an opened store on what dir holds. The suite closes it.
type Open func(t *testing.T, dir string) store.Store

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for name, test := range map[string]func(*testing.T, Open){
		"ReadsWhatWasWritten":   readsWhatWasWritten,
		"CopiesAreTheCallers":   copiesAreTheCallers,
		"RollsBack":             rollsBack,
		"OneSnapshotPerView":    oneSnapshotPerView,
		"ScansInOrder":          scansInOrder,
		"ScansWhileWriting":     scansWhileWriting,
		"EventsAreNumbered":     eventsAreNumbered,
		"Requests":              requests,
		"RevisionsCountWrites":  revisionsCountWrites,
		"ConcurrentUpdates":     concurrentUpdates,
		"FailuresDoNotSpread":   failuresDoNotSpread,
		"PanicsAreTheCallers":   panicsAreTheCallers,
		"WatchYieldsEverything": watchYieldsEverything,
		"SlowWatcherIsToldSo":   slowWatcherIsToldSo,
		"EndedContext":          endedContext,
		"SurvivesReopening":     survivesReopening,
		"ClosedIsUnavailable":   closedIsUnavailable,
	} {
		t.Run(name, func(t *testing.T) { test(t, open) })
	}
}

// NewSession returns a session with every field set that a store must keep.
func NewSession(id string) *fleet.Session {
	now := time.Date(2026, 11, 23, 12, 0, 0, 123456789, time.UTC)
	spec := fleet.Spec{
		Image: "image:1", Env: map[string]string{"A": "1", "B": "ü\n\x00"}, OpenCodeConfig: `{"a":1}`,
		Resources:    fleet.Resources{CPUMillis: 1500, MemoryBytes: 1 << 30, PIDs: 100, DiskBytes: 1 << 33},
		NodeSelector: map[string]string{"zone": "a"},
	}
	return &fleet.Session{
		ID: id, UID: "uid-" + id, CreateTime: now, UpdateTime: now.Add(time.Second),
		Labels: map[string]string{"team": "web"}, Spec: spec, State: fleet.StateRunning, Reason: "R", Message: "m",
		Progress:   &fleet.Progress{Phase: "image", Detail: "d", Current: 1, Total: 2},
		Assignment: &fleet.Assignment{Node: "n1", Generation: 3, Spec: spec.Clone(), Password: "secret"},
		Generation: 3, RestartCount: 2, ReadyTime: now, OpenCodeVersion: "1.18.34",
	}
}

func temp(t *testing.T, open Open) store.Store {
	t.Helper()
	s := open(t, t.TempDir())
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func update(t *testing.T, s store.Store, fn func(store.Tx) error) store.Revision {
	t.Helper()
	r, err := s.Update(t.Context(), fn)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func view(t *testing.T, s store.Store, fn func(store.ReadTx) error) {
	t.Helper()
	if err := s.View(t.Context(), fn); err != nil {
		t.Fatal(err)
	}
}

func session(t *testing.T, s store.Store, id string) (got *fleet.Session) {
	t.Helper()
	view(t, s, func(tx store.ReadTx) (err error) { got, err = tx.Session(id); return err })
	return got
}

func putSession(sess *fleet.Session) func(store.Tx) error {
	return func(tx store.Tx) error { return tx.PutSession(sess) }
}

func readsWhatWasWritten(t *testing.T, open Open) {
	s := temp(t, open)
	want := NewSession("a")
	node := &fleet.Node{
		ID: "n1", CreateTime: want.CreateTime, Labels: map[string]string{"zone": "a"}, State: fleet.NodeReady,
		Info: fleet.NodeInfo{Hostname: "h", CPUMillis: 4000}, RegistrationID: "r", HeartbeatTime: want.CreateTime,
	}
	rev := update(t, s, func(tx store.Tx) error {
		if err := tx.PutSession(want); err != nil {
			return err
		}
		if got, err := tx.Session("a"); err != nil || got.UID != want.UID {
			t.Errorf("a transaction does not read its own write: %v, %v", got, err)
		}
		return tx.PutNode(node)
	})
	if want.Revision != uint64(rev) || node.Revision != uint64(rev) {
		t.Errorf("revisions %d and %d, want %d", want.Revision, node.Revision, rev)
	}
	view(t, s, func(tx store.ReadTx) error {
		got, err := tx.Session("a")
		if err != nil {
			return err
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		gotNode, err := tx.Node("n1")
		if err != nil {
			return err
		}
		if d := cmp.Diff(node, gotNode); d != "" {
			t.Error(d)
		}
		for what, err := range map[string]error{
			"session": second(tx.Session("b")), "node": second(tx.Node("n2")), "request": second(tx.Request("r")),
		} {
			if !errors.Is(err, fleet.ErrNotFound) {
				t.Errorf("missing %s: %v", what, err)
			}
		}
		return nil
	})
	update(t, s, func(tx store.Tx) error { return tx.DeleteSession("a") })
	_, err := s.Update(t.Context(), func(tx store.Tx) error { return tx.DeleteSession("a") })
	if !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("delete twice: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func copiesAreTheCallers(t *testing.T, open Open) {
	s := temp(t, open)
	mine := NewSession("a")
	update(t, s, putSession(mine))
	mine.Labels["team"] = "changed"
	got := session(t, s, "a")
	if got.Labels["team"] != "web" {
		t.Error("the store shares what it was given")
	}
	got.Labels["team"] = "changed"
	if session(t, s, "a").Labels["team"] != "web" {
		t.Error("the store shares what it gave")
	}
}

func rollsBack(t *testing.T, open Open) {
	s := temp(t, open)
	before := update(t, s, putSession(NewSession("a")))
	oops := errors.New("oops")
	_, err := s.Update(t.Context(), func(tx store.Tx) error {
		if err := errors.Join(tx.PutSession(NewSession("b")), tx.DeleteSession("a"), tx.PutRequest("r", store.Request{UnixSeconds: time.Now().Unix()})); err != nil {
			t.Error(err)
		}
		if _, err := tx.AppendEvent(NewSession("b")); err != nil {
			t.Error(err)
		}
		return oops
	})
	if !errors.Is(err, oops) {
		t.Fatalf("error is %v", err)
	}
	view(t, s, func(tx store.ReadTx) error {
		if tx.Revision() != before {
			t.Errorf("revision moved from %d to %d", before, tx.Revision())
		}
		if _, err := tx.Session("b"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("b: %v", err)
		}
		if _, err := tx.Request("r"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("request: %v", err)
		}
		if n := len(events(t, tx, "uid-b", 0)); n != 0 {
			t.Errorf("%d events", n)
		}
		_, err := tx.Session("a")
		return err
	})
	for c, err := range watchFor(t, s, before) {
		t.Errorf("a change that was rolled back: %+v, %v", c, err)
	}
}

// watchFor yields what is there already, and ends.
func watchFor(t *testing.T, s store.Store, after store.Revision) func(func(store.Change, error) bool) {
	return func(yield func(store.Change, error) bool) {
		var newest store.Revision
		view(t, s, func(tx store.ReadTx) error { newest = tx.Revision(); return nil })
		// A marker ends it without waiting for silence.
		marker := update(t, s, func(tx store.Tx) error { return tx.PutNode(&fleet.Node{ID: "zz-marker"}) })
		if marker != newest+1 {
			t.Errorf("marker has revision %d after %d", marker, newest)
		}
		for c, err := range s.Watch(t.Context(), after) {
			if err == nil && c.Revision == marker {
				return
			}
			if !yield(c, err) {
				return
			}
		}
	}
}

func oneSnapshotPerView(t *testing.T, open Open) {
	s := temp(t, open)
	update(t, s, putSession(NewSession("a")))
	view(t, s, func(tx store.ReadTx) error {
		done := make(chan error, 1)
		go func() {
			_, err := s.Update(t.Context(), putSession(NewSession("b")))
			done <- err
		}()
		select {
		case err := <-done:
			if err != nil {
				return err
			}
		case <-time.After(10 * time.Second):
			return errors.New("a reader keeps a writer waiting")
		}
		if _, err := tx.Session("b"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("a snapshot changes while it is read: %v", err)
		}
		return nil
	})
	session(t, s, "b")
}

func ids(t *testing.T, tx store.ReadTx, after string) string {
	t.Helper()
	var got []string
	for sess, err := range tx.Sessions(after) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, sess.ID)
	}
	return strings.Join(got, " ")
}

func scansInOrder(t *testing.T, open Open) {
	s := temp(t, open)
	update(t, s, func(tx store.Tx) error {
		for _, id := range []string{"c", "a", "ab", "b", "a0"} {
			if err := errors.Join(tx.PutSession(NewSession(id)), tx.PutNode(&fleet.Node{ID: id})); err != nil {
				return err
			}
		}
		return nil
	})
	view(t, s, func(tx store.ReadTx) error {
		for after, want := range map[string]string{"": "a a0 ab b c", "a": "a0 ab b c", "aa": "ab b c", "c": "", "zz": ""} {
			if got := ids(t, tx, after); got != want {
				t.Errorf("after %q: %q, want %q", after, got, want)
			}
			var nodes []string
			for n, err := range tx.Nodes(after) {
				if err != nil {
					return err
				}
				nodes = append(nodes, n.ID)
			}
			if got := strings.Join(nodes, " "); got != want {
				t.Errorf("nodes after %q: %q, want %q", after, got, want)
			}
		}
		for range tx.Sessions("") {
			break // must not panic
		}
		return nil
	})
}

func scansWhileWriting(t *testing.T, open Open) {
	s := temp(t, open)
	const n = 300 // several pages
	update(t, s, func(tx store.Tx) error {
		for i := range n {
			if err := tx.PutSession(NewSession(fmt.Sprintf("s%04d", i))); err != nil {
				return err
			}
		}
		return nil
	})
	seen := map[string]int{}
	update(t, s, func(tx store.Tx) error {
		clear(seen)
		for sess, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			seen[sess.ID]++
			if len(seen)%3 == 0 {
				if err := tx.DeleteSession(sess.ID); err != nil {
					return err
				}
				continue
			}
			sess.Message = strings.Repeat("x", 500)
			if err := tx.PutSession(sess); err != nil {
				return err
			}
		}
		return nil
	})
	if len(seen) != n {
		t.Errorf("saw %d of %d", len(seen), n)
	}
	for id, times := range seen {
		if times != 1 {
			t.Errorf("saw %s %d times", id, times)
		}
	}
	view(t, s, func(tx store.ReadTx) error {
		if got := len(strings.Fields(ids(t, tx, ""))); got != n-n/3 {
			t.Errorf("%d are left", got)
		}
		return nil
	})
}

func events(t *testing.T, tx store.ReadTx, uid string, after uint64) (got []*fleet.LifecycleEvent) {
	t.Helper()
	for e, err := range tx.Events(uid, after) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	return got
}

func eventsAreNumbered(t *testing.T, open Open) {
	s := temp(t, open)
	sess := NewSession("a")
	const n = store.EventsKept + 7
	update(t, s, func(tx store.Tx) error {
		if err := tx.PutSession(sess); err != nil {
			return err
		}
		for i := range n {
			seq, err := tx.AppendEvent(sess)
			if err != nil {
				return err
			}
			if seq != uint64(i+1) {
				t.Errorf("event %d has number %d", i+1, seq)
			}
		}
		return nil
	})
	view(t, s, func(tx store.ReadTx) error {
		all := events(t, tx, sess.UID, 0)
		if len(all) != store.EventsKept || all[0].Sequence != n-store.EventsKept+1 || all[len(all)-1].Sequence != n {
			t.Errorf("%d events, from %d to %d", len(all), all[0].Sequence, all[len(all)-1].Sequence)
		}
		if got := events(t, tx, sess.UID, n-2); len(got) != 2 || got[0].Sequence != n-1 {
			t.Errorf("after %d: %+v", n-2, got)
		}
		got := all[0].Session
		if got.ID != "a" || got.Assignment == nil || got.Assignment.Password != "" {
			t.Errorf("event holds %+v with %+v", got, got.Assignment)
		}
		return nil
	})
	if sess.Assignment.Password == "" {
		t.Error("AppendEvent changed the caller's session")
	}
	update(t, s, func(tx store.Tx) error { return tx.DeleteSession("a") })
	view(t, s, func(tx store.ReadTx) error {
		if got := events(t, tx, sess.UID, 0); len(got) != 0 {
			t.Errorf("%d events are left of a deleted session", len(got))
		}
		return nil
	})
}

func requests(t *testing.T, open Open) {
	s := temp(t, open)
	now := time.Now().Unix()
	fresh := store.Request{Fingerprint: "f", SessionID: "a", SessionUID: "u", UnixSeconds: now - 3600}
	update(t, s, func(tx store.Tx) error {
		return errors.Join(
			tx.PutRequest("fresh", fresh),
			tx.PutRequest("old", store.Request{UnixSeconds: now - 90000}),
			tx.PutRequest("again", store.Request{UnixSeconds: now - 95000}),
			tx.PutRequest("again", fresh),
		)
	})
	for range 2 {
		view(t, s, func(tx store.ReadTx) error {
			for _, key := range []string{"fresh", "again"} {
				if got, err := tx.Request(key); err != nil || got != fresh {
					t.Errorf("%s: %+v, %v", key, got, err)
				}
			}
			if _, err := tx.Request("old"); !errors.Is(err, fleet.ErrNotFound) {
				t.Errorf("request of yesterday: %v", err)
			}
			return nil
		})
		// Once more after the old one was dropped for good.
		update(t, s, func(tx store.Tx) error { return tx.PutRequest("new", store.Request{UnixSeconds: now}) })
	}
}

func revisionsCountWrites(t *testing.T, open Open) {
	s := temp(t, open)
	first := update(t, s, putSession(NewSession("a")))
	if first != 1 {
		t.Errorf("the first write has revision %d", first)
	}
	if r := update(t, s, func(tx store.Tx) error { _, err := tx.Session("a"); return err }); r != first {
		t.Errorf("a read has revision %d", r)
	}
	if r := update(t, s, putSession(NewSession("b"))); r != first+1 {
		t.Errorf("the second write has revision %d", r)
	}
}

func concurrentUpdates(t *testing.T, open Open) {
	s := temp(t, open)
	start := NewSession("a")
	start.RestartCount = 0
	update(t, s, putSession(start))
	const workers, rounds = 50, 10
	var mu sync.Mutex
	seen := map[store.Revision]bool{}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range rounds {
				r, err := s.Update(t.Context(), func(tx store.Tx) error {
					sess, err := tx.Session("a")
					if err != nil {
						return err
					}
					sess.RestartCount++
					return tx.PutSession(sess)
				})
				mu.Lock()
				if err != nil || seen[r] {
					t.Errorf("revision %d twice, or error %v", r, err)
				}
				seen[r] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if got := session(t, s, "a"); got.RestartCount != workers*rounds || got.Revision != 1+workers*rounds {
		t.Errorf("count %d at revision %d: updates were lost", got.RestartCount, got.Revision)
	}
}

func failuresDoNotSpread(t *testing.T, open Open) {
	s := temp(t, open)
	oops := errors.New("oops")
	const n = 60
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			_, errs[i] = s.Update(t.Context(), func(tx store.Tx) error {
				if err := tx.PutSession(NewSession(fmt.Sprintf("s%02d", i))); err != nil {
					return err
				}
				if i%4 == 0 {
					return oops
				}
				return nil
			})
		})
	}
	wg.Wait()
	view(t, s, func(tx store.ReadTx) error {
		for i, err := range errs {
			_, missing := tx.Session(fmt.Sprintf("s%02d", i))
			if bad := i%4 == 0; bad != errors.Is(err, oops) || bad != (missing != nil) {
				t.Errorf("%d: %v, %v", i, err, missing)
			}
		}
		if tx.Revision() != n-n/4 {
			t.Errorf("revision %d", tx.Revision())
		}
		return nil
	})
}

func panicsAreTheCallers(t *testing.T, open Open) {
	s := temp(t, open)
	func() {
		defer func() {
			if p := recover(); p != "oops" {
				t.Errorf("recovered %v", p)
			}
		}()
		_, _ = s.Update(t.Context(), func(tx store.Tx) error {
			_ = tx.PutSession(NewSession("a"))
			panic("oops")
		})
	}()
	if r := update(t, s, putSession(NewSession("b"))); r != 1 {
		t.Errorf("revision %d", r)
	}
}

func watchYieldsEverything(t *testing.T, open Open) {
	s := temp(t, open)
	update(t, s, putSession(NewSession("before")))
	const n = 200
	got := make(chan []store.Change, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch := func() {
		var all []store.Change
		for c, err := range s.Watch(ctx, 1) {
			if err != nil {
				t.Error(err)
				break
			}
			all = append(all, c)
			if c.Kind == store.KindSession && c.ID == "last" {
				break
			}
		}
		got <- all
	}
	go watch()
	go watch()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range n / 4 {
				sess := NewSession(fmt.Sprintf("s%d-%d", i, j))
				if _, err := s.Update(ctx, func(tx store.Tx) error {
					if err := errors.Join(tx.PutSession(sess), tx.PutNode(&fleet.Node{ID: sess.ID})); err != nil {
						return err
					}
					_, err := tx.AppendEvent(sess)
					return err
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	update(t, s, func(tx store.Tx) error { return tx.DeleteSession("before") })
	update(t, s, putSession(NewSession("last")))
	go watch() // a late one sees the same
	var first []store.Change
	for range 3 {
		all := <-got
		if first == nil {
			first = all
		}
		if len(all) != 3*n+2 || cmp.Diff(first, all) != "" {
			t.Fatalf("%d changes, or not the same for all", len(all))
		}
	}
	for i, c := range first[:3*n] {
		if want := store.Revision(2 + i/3); c.Revision != want {
			t.Fatalf("change %d has revision %d, want %d", i, c.Revision, want)
		}
		kind := []store.Kind{store.KindSession, store.KindNode, store.KindEvent}[i%3]
		if c.Kind != kind || (c.Session != nil) != (i%3 == 0) || (c.Node != nil) != (i%3 == 1) || (c.Event != nil) != (i%3 == 2) {
			t.Fatalf("change %d: %+v", i, c)
		}
		if c.Session != nil && (c.Session.ID != c.ID || c.Session.Revision != uint64(c.Revision) || c.Session.Assignment.Password != "secret") {
			t.Fatalf("change %d: %+v", i, c.Session)
		}
	}
	if gone := first[3*n]; gone.Kind != store.KindSession || gone.ID != "before" || gone.Session != nil {
		t.Errorf("removal: %+v", gone)
	}
}

func slowWatcherIsToldSo(t *testing.T, open Open) {
	s := temp(t, open)
	first := update(t, s, putSession(NewSession("a")))
	stale := func(after store.Revision) (told bool) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for _, err := range s.Watch(ctx, after) {
			if errors.Is(err, fleet.ErrStale) {
				told = true // and the loop must end by itself
			} else if told || err != nil {
				t.Errorf("after ErrStale: %v", err)
			} else {
				cancel()
			}
		}
		return told
	}
	big := &fleet.Node{ID: "big", Message: strings.Repeat("x", 1<<20)}
	for range 100 { // changes that no store keeps in memory for ever
		update(t, s, func(tx store.Tx) error { return tx.PutNode(big) })
	}
	if !stale(first) {
		t.Error("100 MiB behind, and not stale")
	}
	if !stale(1 << 40) {
		t.Error("a revision that never was is not stale")
	}
	var newest store.Revision
	view(t, s, func(tx store.ReadTx) error { newest = tx.Revision(); return nil })
	if stale(newest - 1) {
		t.Error("one behind is stale")
	}
}

func endedContext(t *testing.T, open Open) {
	s := temp(t, open)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Update(ctx, putSession(NewSession("a"))); !errors.Is(err, context.Canceled) {
		t.Errorf("update: %v", err)
	}
	if err := s.View(ctx, func(store.ReadTx) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("view: %v", err)
	}
	for range s.Watch(ctx, 0) {
		t.Error("watch yields")
	}
	ctx, cancel = context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for c, err := range s.Watch(ctx, 0) {
			t.Errorf("watch yields %+v, %v", c, err)
		}
	}()
	cancel()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("watch does not end with its context")
	}
}

func survivesReopening(t *testing.T, open Open) {
	dir := t.TempDir()
	s := open(t, dir)
	want := NewSession("a")
	rev := update(t, s, func(tx store.Tx) error {
		if err := tx.PutSession(want); err != nil {
			return err
		}
		_, err := tx.AppendEvent(want)
		return err
	})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	defer s.Close()
	if d := cmp.Diff(want, session(t, s, "a")); d != "" {
		t.Error(d)
	}
	view(t, s, func(tx store.ReadTx) error {
		if tx.Revision() != rev {
			t.Errorf("revision %d became %d", rev, tx.Revision())
		}
		return nil
	})
	for _, err := range s.Watch(t.Context(), rev-1) {
		if !errors.Is(err, fleet.ErrStale) {
			t.Errorf("history of before: %v", err)
		}
	}
	next := update(t, s, func(tx store.Tx) error {
		if seq, err := tx.AppendEvent(want); err != nil || seq != 2 {
			t.Errorf("event %d, %v", seq, err)
		}
		return nil
	})
	if next != rev+1 {
		t.Errorf("revision %d after %d", next, rev)
	}
	for c, err := range s.Watch(t.Context(), rev) {
		if err != nil || c.Revision != next || c.Kind != store.KindEvent {
			t.Errorf("%+v, %v", c, err)
		}
		break
	}
}

func closedIsUnavailable(t *testing.T, open Open) {
	s := open(t, t.TempDir())
	ended := make(chan error, 1)
	go func() {
		var last error
		for _, last = range s.Watch(context.Background(), 0) {
		}
		ended <- last
	}()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, fleet.ErrUnavailable) {
			t.Errorf("watch ends with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("watch outlives the store")
	}
	if _, err := s.Update(t.Context(), putSession(NewSession("a"))); !errors.Is(err, fleet.ErrUnavailable) {
		t.Errorf("update: %v", err)
	}
	if err := s.View(t.Context(), func(store.ReadTx) error { return nil }); !errors.Is(err, fleet.ErrUnavailable) {
		t.Errorf("view: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("close twice: %v", err)
	}
}
