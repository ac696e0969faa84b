package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/opencode"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const uid = "0197f1b2-0000-7000-8000-000000000001"

// world is one bucket and the nodes that use it.
type world struct {
	t     *testing.T
	store *objstore.Memory
	dir   string

	mu   sync.Mutex
	down error // what every request gets
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("other owners need root")
		}
		t.Skip("other owners need root")
	}
	w := &world{t: t, store: objstore.NewMemory(), dir: t.TempDir()}
	w.store.Fail = func(string, string) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.down
	}
	return w
}

func (w *world) setDown(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = err
}

var errAway = fmt.Errorf("%w: nobody answers", objstore.ErrUnavailable)

// node is a machine with a disk of its own.
type node struct {
	w   *world
	id  string
	m   *Manager
	vol volume.Volume

	mu           sync.Mutex
	stops        int // of the container
	frozen       bool
	checkpointed []*cloudcodev1.Checkpoint
}

func (w *world) node(id string) *node {
	w.t.Helper()
	n := &node{w: w, id: id}
	n.restart()
	dir := filepath.Join(w.dir, id)
	n.vol = volume.Volume{
		Session: "s1-0197f1b2", Dir: dir, IDBase: 0x10000000, S3Dir: filepath.Join(dir, "data", "s3"),
		MountDir: filepath.Join(dir, "mnt"), RootDir: filepath.Join(dir, "root"), StateDir: filepath.Join(dir, "state"),
	}
	w.must(os.MkdirAll(n.vol.S3Dir, 0o755))
	return n
}

// restart is a new node daemon.
func (n *node) restart() {
	n.m = New(Config{
		Node: n.id, Instance: "instance-" + n.id, Log: slog.New(slog.DiscardHandler),
		OpenStore: func(storage.Config) (objstore.Store, error) { return n.w.store, nil },
	})
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func assignment(generation int64) *nodev1.Assignment {
	return &nodev1.Assignment{
		SessionId: "s1", SessionUid: uid, Generation: generation, DesiredState: nodev1.Assignment_RUN,
		Spec: &cloudcodev1.SessionSpec{Image: "img", Storage: &cloudcodev1.Storage{S3: &cloudcodev1.S3Storage{SecretAccessKey: "hunter2"}}},
		Storage: &nodev1.AssignedStorage{
			Mode: cloudcodev1.Storage_SNAPSHOT, Endpoint: "http://s3.test", Bucket: "b", Root: "team", Prefix: "s1",
			AccessKeyId: "k", SecretAccessKey: "hunter2",
		},
	}
}

func (n *node) params(a *nodev1.Assignment) Params {
	return Params{
		Assignment: a, Volume: n.vol,
		Stop: func(context.Context) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.stops++
			return nil
		},
		Freeze: func(context.Context) (func() error, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.frozen = true
			return func() error {
				n.mu.Lock()
				defer n.mu.Unlock()
				n.frozen = false
				return nil
			}, nil
		},
		Labels:  func() map[string]string { return map[string]string{"team": "web"} },
		Changed: func(bool) {},
		Checkpointed: func(c *cloudcodev1.Checkpoint) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.checkpointed = append(n.checkpointed, c)
		},
		Progress: func(string, string, int64, int64) {},
	}
}

func (n *node) open(a *nodev1.Assignment) *Session {
	n.w.t.Helper()
	p := n.params(a)
	p.Progress = func(phase, _ string, _, _ int64) {
		if phase == "restore" { // somebody opens the volume meanwhile
			_ = os.Mkdir(n.vol.S3Dir, 0o755)
		}
	}
	s, err := n.m.Open(n.w.t.Context(), p)
	n.w.must(err)
	return s
}

// run saves the session in the background until the returned function is called,
// which says how that ended.
func (n *node) run(s *Session) (stop func() error) {
	ctx, cancel := context.WithCancel(n.w.t.Context())
	done := make(chan error, 1)
	s.ended = make(chan struct{}) // a test saves one session several times
	go func() { done <- s.Run(ctx) }()
	return func() error {
		cancel()
		return <-done
	}
}

func (n *node) save(s *Session) string {
	n.w.t.Helper()
	stop := n.run(s)
	c, err := s.SaveNow(n.w.t.Context(), TriggerManual)
	if rerr := stop(); !errors.Is(rerr, context.Canceled) {
		n.w.t.Errorf("Run: %v", rerr)
	}
	n.w.must(err)
	return c.GetId()
}

func (n *node) write(name, data string) {
	n.w.t.Helper()
	n.w.must(os.WriteFile(filepath.Join(n.vol.S3Dir, name), []byte(data), 0o644))
}

func (n *node) want(name, data string) {
	n.w.t.Helper()
	got, err := os.ReadFile(filepath.Join(n.vol.S3Dir, name))
	if data == "" && errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil || string(got) != data {
		n.w.t.Errorf("%s on node %s is %q (%v), want %q", name, n.id, got, err, data)
	}
}

func TestMovesAndFences(t *testing.T) {
	w := newWorld(t)
	a, b := w.node("a"), w.node("b")
	first := a.open(assignment(1))
	a.write("f", "one")
	a.save(first)
	a.write("f", "two, never saved")

	second := b.open(assignment(2))
	defer second.Close()
	b.want("f", "one")
	if b.stops == 0 {
		t.Errorf("the container was not stopped before its files were replaced")
	}
	b.write("f", "three")
	id := b.save(second)

	keys := w.store.Keys()
	if _, err := first.save(t.Context(), TriggerBusy, nil); !errors.Is(err, ErrFenced) {
		t.Errorf("the old owner saved: %v", err)
	}
	first.ended = make(chan struct{})
	if err := first.Run(t.Context()); !errors.Is(err, ErrFenced) {
		t.Errorf("Run of the old owner: %v", err)
	}
	w.must(second.repo.Verify(t.Context(), second.owner))
	if head, err := second.repo.Head(t.Context()); err != nil || head.Manifest != id {
		t.Errorf("head is %v, %v", head, err)
	}
	for _, k := range keys {
		if _, err := w.store.Stat(t.Context(), k); err != nil {
			t.Errorf("%s: %v", k, err)
		}
	}
	first.Close()
	// It is not started again, and by no daemon that does not know of it yet.
	for range 2 {
		if _, err := a.m.Open(t.Context(), a.params(assignment(1))); !errors.Is(err, ErrFenced) {
			t.Errorf("the old owner opened it again: %v", err)
		}
		a.restart()
	}
	if !a.m.Unsaved(a.vol) {
		t.Error("that its last change was never saved is forgotten")
	}
	if _, err := a.m.Open(t.Context(), func() Params {
		p := a.params(assignment(1))
		w.must(os.Remove(filepath.Join(a.vol.StateDir, markFile)))
		return p
	}()); !errors.Is(err, ErrFenced) {
		t.Errorf("an old generation took the session over: %v", err)
	}

	// It comes back with a newer generation: what it had is put aside.
	third := a.open(assignment(3))
	defer third.Close()
	a.want("f", "three")
	if data, err := os.ReadFile(filepath.Join(filepath.Dir(a.vol.S3Dir), "aside", "f")); string(data) != "two, never saved" {
		t.Errorf("put aside: %q, %v", data, err)
	}
}

func TestRestartKeepsWhatIsNewer(t *testing.T) {
	w := newWorld(t)
	a := w.node("a")
	s := a.open(assignment(1))
	a.write("f", "one")
	a.save(s)
	a.write("f", "two")
	s.Close()

	a.restart()
	a.stops = 0
	w.setDown(errAway) // the same generation needs no object store
	s = a.open(assignment(1))
	a.want("f", "two")
	s.Close()
	if _, err := a.m.Open(t.Context(), a.params(assignment(2))); !errors.Is(err, objstore.ErrUnavailable) {
		t.Errorf("a new generation without object store: %v", err)
	}
	// Under a running container it goes on all the same, and is taken over later.
	p := a.params(assignment(2))
	p.Adopt = true
	s, err := a.m.Open(t.Context(), p)
	w.must(err)
	if _, err := s.save(t.Context(), TriggerBusy, nil); !errors.Is(err, objstore.ErrUnavailable) {
		t.Errorf("saved without object store: %v", err)
	}
	if st := s.Status(); st.GetUnsavedSince() == nil || !strings.Contains(st.GetMessage(), "nobody answers") {
		t.Errorf("status %v", st)
	}
	w.setDown(nil)
	a.save(s)
	if st := s.Status(); st.GetUnsavedSince() != nil || strings.Contains(st.GetMessage(), "saved") || st.GetCheckpoint().GetGeneration() != 2 {
		t.Errorf("status after it was saved: %v", st)
	}
	a.want("f", "two")
	s.Close()
	if a.stops != 0 {
		t.Errorf("the container was stopped %d times", a.stops)
	}
	// A crash between the mark and the head: whichever it was, the tree is ours.
	for _, m := range []mark{
		{UID: uid, Instance: "instance-a", Acquired: 1, Acquiring: 2},
		{UID: uid, Instance: "instance-a", Acquired: 2, Acquiring: 3},
	} {
		w.must(m.save(a.vol.StateDir))
		a.write("f", "three")
		s = a.open(assignment(3))
		a.want("f", "three")
		s.Close()
		w.must(mark{UID: uid, Instance: "instance-a", Acquired: 3}.save(a.vol.StateDir))
	}
}

func TestFinish(t *testing.T) {
	w := newWorld(t)
	a, b := w.node("a"), w.node("b")
	s := a.open(assignment(1))
	a.write("f", "one")
	if held, err := a.m.Holds(a.vol, assignment(1)); !held || err != nil {
		t.Errorf("holds: %v, %v", held, err)
	}
	w.setDown(errAway)
	if err := s.Finish(t.Context(), TriggerSuspend, false); !errors.Is(err, objstore.ErrUnavailable) {
		t.Errorf("finished without object store: %v", err)
	}
	w.setDown(nil)
	w.must(s.Finish(t.Context(), TriggerSuspend, false))
	head, err := s.repo.Head(t.Context())
	if err != nil || !head.Released || !head.DeleteTime.IsZero() {
		t.Errorf("head %+v, %v", head, err)
	}
	if st := s.Status().GetCheckpoint(); st.GetTrigger() != TriggerSuspend || st.GetNode() != "nodes/a" {
		t.Errorf("checkpoint %v", st)
	}
	s = b.open(assignment(2))
	b.want("f", "one")
	w.must(s.Finish(t.Context(), TriggerStop, true))
	if head, err = s.repo.Head(t.Context()); err != nil || head.DeleteTime.IsZero() {
		t.Errorf("head of a deleted session %+v, %v", head, err)
	}
	if held, _ := b.m.Holds(b.vol, assignment(9)); !held {
		t.Error("what is here is the session's, whatever the generation")
	}
	other := assignment(1)
	other.SessionUid = "0197f1b2-0000-7000-8000-000000000002"
	if held, _ := b.m.Holds(b.vol, other); held {
		t.Error("what is here is not another session's")
	}
	for _, k := range w.store.Keys() {
		data, _, err := w.store.Get(t.Context(), k)
		if err != nil || strings.Contains(string(data), "hunter2") {
			t.Errorf("%s has a secret key in it, or cannot be read: %v", k, err)
		}
	}
}

func TestRestore(t *testing.T) {
	w := newWorld(t)
	a, b := w.node("a"), w.node("b")
	s := a.open(assignment(1))
	a.write("f", "old")
	old := a.save(s)
	a.write("f", "new")
	a.save(s)
	a.write("f", "newest")
	s.Close()

	a.stops = 0
	back := assignment(2)
	back.RestoreCheckpoint = old
	s = a.open(back)
	a.want("f", "old")
	if a.stops != 1 {
		t.Errorf("the container was stopped %d times", a.stops)
	}
	list, err := s.repo.List(t.Context())
	w.must(err)
	if len(list) != 4 || list[0].Trigger != TriggerRestore || list[1].Trigger != TriggerRestore {
		t.Fatalf("checkpoints %+v", list)
	}
	undo := list[1].ID
	a.write("f", "worked on")
	a.save(s)
	s.Close()
	// Not again: neither here, nor on another node that is told the same.
	s = a.open(back)
	a.want("f", "worked on")
	w.must(s.Finish(t.Context(), TriggerSuspend, false))
	s = b.open(back)
	b.want("f", "worked on")
	s.Close()
	// What was before is there to go back to.
	again := assignment(3)
	again.RestoreCheckpoint = undo
	s = b.open(again)
	b.want("f", "newest")
	s.Close()
	// One that was cut off while it replaced the tree does not save half of it.
	w.must(mark{UID: uid, Instance: "instance-b", Acquired: 3, Acquiring: 4, Restoring: "4/" + old}.save(b.vol.StateDir))
	w.must(os.Remove(filepath.Join(b.vol.S3Dir, "f")))
	cut := assignment(4)
	cut.RestoreCheckpoint = old
	s = b.open(cut)
	defer s.Close()
	b.want("f", "old")
	list, err = s.repo.List(t.Context())
	w.must(err)
	if list[1].ID == "" || list[1].Trigger == TriggerRestore && list[1].Files < 2 {
		t.Errorf("half a tree was saved: %+v", list[1])
	}
	missing := assignment(5)
	missing.RestoreCheckpoint = "20000101t000000.000z-none"
	if _, err := b.m.Open(t.Context(), b.params(missing)); !errors.Is(err, checkpoint.ErrNotFound) {
		t.Errorf("a checkpoint that is not there: %v", err)
	}
	b.want("f", "old")
}

func event(kind, props string) opencode.Event {
	return opencode.Event{Type: kind, Frame: []byte(`{"payload":{"type":"` + kind + `","properties":` + props + `}}`)}
}

// emptyPools drops compressors that are kept for reuse: their channels belong to the
// bubble that they were made in, or to none. Two collections do that.
func emptyPools() {
	runtime.GC()
	runtime.GC()
}

func TestTurnsAndPeriods(t *testing.T) {
	w := newWorld(t)
	emptyPools()
	defer emptyPools()
	synctest.Test(t, func(t *testing.T) {
		w.t = t
		a := w.node("a")
		s := a.open(assignment(1))
		stop := a.run(s)
		s.Listening()
		settle := func(d time.Duration) {
			time.Sleep(d) // virtual: inside a synctest bubble
			synctest.Wait()
		}
		saved := func() *cloudcodev1.Checkpoint { return s.Status().GetCheckpoint() }
		s.Event(event("session.status", `{"sessionID":"c1","status":{"type":"busy"}}`))
		settle(idleShortest)
		before := saved().GetId()
		a.write("f", "one")
		settle(busyPeriod + 100*time.Millisecond)
		if c := saved(); c.GetId() == before || c.GetTrigger() != TriggerBusy {
			t.Errorf("a busy session's change was not saved within its period: %v", c)
		}
		a.write("f", "two")
		s.Event(event("session.idle", `{"sessionID":"c1"}`))
		settle(10 * time.Millisecond)
		if len(a.checkpointed) != 1 || a.checkpointed[0].GetTrigger() != TriggerTurn {
			t.Fatalf("after the turn: %v", a.checkpointed)
		}
		// The object store is away when the next turn ends: it is said, and made good.
		w.setDown(errAway)
		a.write("f", "three")
		s.Event(event("session.idle", `{"sessionID":"c1"}`))
		settle(time.Minute)
		if st := s.Status(); len(a.checkpointed) != 1 || st.GetUnsavedSince() == nil {
			t.Errorf("while the object store is away: %d events, status %v", len(a.checkpointed), st)
		}
		w.setDown(nil)
		settle(longBackoff + idleShortest)
		if len(a.checkpointed) != 2 || s.Status().GetUnsavedSince() != nil {
			t.Errorf("after it came back: %d events, status %v", len(a.checkpointed), s.Status())
		}
		// A turn that changed nothing is said, too.
		s.Event(event("session.idle", `{"sessionID":"c1"}`))
		settle(10 * time.Millisecond)
		if len(a.checkpointed) != 3 {
			t.Errorf("a turn without a change: %d events", len(a.checkpointed))
		}
		// A session at rest is looked at now and then; a turn that begins does not wait for that.
		s.Event(event("session.status", `{"sessionID":"c1","status":{"type":"busy"}}`))
		a.write("f", "four")
		before = saved().GetId()
		settle(busyPeriod + 100*time.Millisecond)
		if c := saved(); busyPeriod >= idleShortest || c.GetId() == before || c.GetTrigger() != TriggerBusy {
			t.Errorf("the beginning of a turn was not saved within the period: %v", c)
		}
		s.Event(event("session.idle", `{"sessionID":"c1"}`))
		settle(10 * time.Millisecond)
		if a.frozen {
			t.Error("left frozen")
		}
		// Somebody takes over: an idle session notices, too.
		other := w.node("b").open(assignment(2))
		other.Close()
		settle(verifyEvery + idleLongest)
		if err := stop(); !errors.Is(err, ErrFenced) {
			t.Errorf("Run: %v", err)
		}
		s.Close()
	})
}

func TestExcluded(t *testing.T) {
	for rel, want := range map[string]bool{
		"bucket": true, "workspace/bucket": false, ".opencode/cache": true, ".opencode/data/opencode/log": true,
		".opencode/data/opencode/opencode.db-shm": true, ".opencode/data/opencode/opencode.db-wal": false,
		".opencode/data/opencode/opencode.db": false, "workspace/x.db-shm": false,
	} {
		if got := Excluded(rel, !strings.Contains(rel, ".db")); got != want {
			t.Errorf("%s: %v", rel, got)
		}
	}
}

// TestCutOff: whatever is killed between two steps of a takeover or a restore, the
// newest state comes back.
func TestCutOff(t *testing.T) {
	t.Run("taken from another node, tree not brought yet", func(t *testing.T) {
		w := newWorld(t)
		a, b := w.node("a"), w.node("b")
		s := a.open(assignment(1))
		a.write("f", "old")
		a.save(s)
		s.Close()
		s = b.open(assignment(2))
		b.write("f", "new")
		b.save(s)
		s.Close()
		// Node a has taken generation 3, and died before it fetched anything.
		p := a.params(assignment(3))
		p.Stop = func(context.Context) error { return errors.New("killed") }
		if _, err := a.m.Open(t.Context(), p); err == nil {
			t.Fatal("not killed")
		}
		for _, generation := range []int64{3, 4} {
			s = a.open(assignment(generation))
			a.want("f", "new")
			s.Close()
		}
	})
	t.Run("a restore that nobody wants any more", func(t *testing.T) {
		w := newWorld(t)
		a := w.node("a")
		s := a.open(assignment(1))
		a.write("f", "first")
		first := a.save(s)
		a.write("f", "second")
		a.save(s)
		s.Close()
		// Killed between putting the tree aside and putting the other in place.
		w.must(mark{UID: uid, Instance: "instance-a", Acquired: 1, Acquiring: 2, Restoring: "2/" + first}.save(a.vol.StateDir))
		w.must(os.Rename(a.vol.S3Dir, filepath.Join(a.vol.Dir, "data", "aside")))
		w.must(os.Mkdir(a.vol.S3Dir, 0o755))
		s = a.open(assignment(3))
		a.want("f", "second")
		s.Close()
	})
	t.Run("the bucket was emptied", func(t *testing.T) {
		w := newWorld(t)
		a := w.node("a")
		s := a.open(assignment(1))
		a.write("f", "one")
		a.save(s)
		w.must(w.store.Delete(t.Context(), w.store.Keys()...))
		a.write("f", "two")
		stop := a.run(s)
		if _, err := s.SaveNow(t.Context(), TriggerManual); err != nil {
			if _, err = s.SaveNow(t.Context(), TriggerManual); err != nil {
				t.Errorf("the session is not saved again: %v", err)
			}
		}
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
		s.Close()
		w.must(w.store.Delete(t.Context(), w.store.Keys()...))
		s = a.open(assignment(2))
		a.want("f", "two")
		a.save(s)
		s.Close()
		b := w.node("b")
		s = b.open(assignment(3))
		b.want("f", "two")
		s.Close()
	})
	t.Run("a restore that cannot be done does not keep it from ending", func(t *testing.T) {
		w := newWorld(t)
		a := w.node("a")
		s := a.open(assignment(1))
		a.write("f", "one")
		s.Close()
		bad := assignment(2)
		bad.RestoreCheckpoint = "20000101t000000.000z-none"
		if _, err := a.m.Open(t.Context(), a.params(bad)); !errors.Is(err, checkpoint.ErrNotFound) {
			t.Errorf("%v", err)
		}
		p := a.params(bad)
		p.Ending = true
		s, err := a.m.Open(t.Context(), p)
		w.must(err)
		w.must(s.Finish(t.Context(), TriggerSuspend, false))
		b := w.node("b")
		s = b.open(assignment(3))
		b.want("f", "one")
		s.Close()
	})
}

// TestLinksInTheTree: what a checkpoint holds leads nowhere outside of the tree.
func TestLinksInTheTree(t *testing.T) {
	w := newWorld(t)
	a := w.node("a")
	outside := t.TempDir()
	for _, link := range []string{".opencode", ".opencode/data"} {
		t.Run(link, func(t *testing.T) {
			w.must(os.RemoveAll(a.vol.S3Dir))
			w.must(os.MkdirAll(filepath.Join(a.vol.S3Dir, filepath.Dir(link)), 0o755))
			w.must(os.Symlink(outside, filepath.Join(a.vol.S3Dir, link)))
			mounted := assignment(1)
			mounted.Storage.Mode = cloudcodev1.Storage_MOUNT
			s := &Session{p: a.params(mounted), a: mounted}
			if err := s.makeTree(); err == nil {
				t.Error("taken for a folder")
			}
			if entries, _ := os.ReadDir(outside); len(entries) != 0 {
				t.Errorf("made outside: %v", entries)
			}
		})
	}
}

// abandoned is a mounter that is only abandoned.
type abandoned struct {
	mount.Mounter
	ids []string
}

func (m *abandoned) Abandon(_ context.Context, id string) error {
	m.ids = append(m.ids, id)
	return nil
}

// TestFinishRemovals: what a mounter has not removed from the bucket is removed after
// its end, and nothing else.
func TestFinishRemovals(t *testing.T) {
	w := newWorld(t)
	a := w.node("a")
	m := &abandoned{}
	s := &Session{m: a.m, p: a.params(assignment(1)), a: assignment(1), store: w.store, mounter: m, log: slog.New(slog.DiscardHandler), status: &cloudcodev1.StorageStatus{}}
	for _, key := range []string{"s1/repo/HEAD.lock", "s1/repo/HEAD", "other"} {
		_, err := w.store.Put(t.Context(), key, []byte("x"), objstore.PutOptions{})
		w.must(err)
	}
	w.must(s.finishRemovals(t.Context(), []string{"/repo/never.lock"}))
	if len(m.ids) != 1 || s.Status().GetMessage() != "" {
		t.Errorf("names that never were objects: %v, %q", m.ids, s.Status().GetMessage())
	}
	w.must(s.finishRemovals(t.Context(), []string{"/repo/HEAD.lock", "/repo/never.lock"}))
	if keys := w.store.Keys(); len(keys) != 2 || !strings.Contains(s.Status().GetMessage(), "HEAD.lock") {
		t.Errorf("left %v, message %q", keys, s.Status().GetMessage())
	}
	w.setDown(errAway)
	if err := s.finishRemovals(t.Context(), []string{"/repo/HEAD"}); !errors.Is(err, objstore.ErrUnavailable) {
		t.Errorf("without object store: %v", err)
	}
}
