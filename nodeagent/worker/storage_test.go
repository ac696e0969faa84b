package worker_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("other owners need root")
		}
		t.Skip("other owners need root")
	}
}

// inBubble runs a test in virtual time. Compressors that are kept for reuse belong
// to the bubble that made them: two collections empty their pool.
func inBubble(t *testing.T, fn func(t *testing.T)) {
	runtime.GC()
	runtime.GC()
	synctest.Test(t, fn)
}

// onBucket makes the fixture's node one of a bucket.
func (f *fixture) onBucket(store objstore.Store, node string) {
	f.storage = checkpoint.New(checkpoint.Config{
		Node: node, Instance: "instance-" + node, Log: slog.New(slog.DiscardHandler),
		OpenStore: func(storage.Config) (objstore.Store, error) { return store, nil },
	})
}

func stored(generation int64) *nodev1.Assignment {
	a := assignment(generation)
	a.Storage = &nodev1.AssignedStorage{Mode: cloudcodev1.Storage_SNAPSHOT, Bucket: "b", Prefix: "s1"}
	return a
}

func (f *fixture) file(name string) string {
	return filepath.Join(f.volumes.dir, worker.VolumeName(stored(1)), "s3", name)
}

func (f *fixture) until(what string, state nodev1.SessionStatus_State) *nodev1.SessionStatus {
	f.t.Helper()
	for range 600 {
		if s := f.last(); s.GetState() == state {
			return s
		}
		settle(100 * time.Millisecond)
	}
	f.t.Fatalf("not %s: %v", what, f.last())
	return nil
}

func TestSuspendHereGoOnThere(t *testing.T) {
	needRoot(t)
	inBubble(t, func(t *testing.T) {
		store := objstore.NewMemory()
		a := newFixture(t)
		a.onBucket(store, "a")
		a.start(stored(1), false)
		first := a.until("running", nodev1.SessionStatus_RUNNING)
		if !first.GetStorage().GetPersistent() || first.GetStorage().GetUri() != "s3://b/s1" {
			t.Errorf("storage %v", first.GetStorage())
		}
		if err := os.WriteFile(a.file("f"), []byte("work"), 0o644); err != nil {
			t.Fatal(err)
		}
		settle(time.Minute)
		if c := a.last().GetStorage().GetCheckpoint(); c == nil {
			t.Errorf("a change was not saved, or that was not reported: %v", a.last())
		}
		c, err := a.worker.Checkpoint(t.Context(), checkpoint.TriggerManual)
		if err != nil || c.GetTrigger() != checkpoint.TriggerManual {
			t.Errorf("%v, %v", c, err)
		}
		suspended := stored(1)
		suspended.DesiredState = nodev1.Assignment_SUSPEND
		a.worker.Assign(suspended)
		s := a.until("suspended", nodev1.SessionStatus_SUSPENDED)
		if s.GetStorage().GetCheckpoint().GetTrigger() != checkpoint.TriggerSuspend {
			t.Errorf("saved as %v", s.GetStorage().GetCheckpoint())
		}
		if _, err := os.Stat(filepath.Dir(a.file(""))); !os.IsNotExist(err) {
			t.Errorf("files are left on the node: %v", err)
		}
		if list, _ := a.fake.List(t.Context()); len(list) != 0 {
			t.Errorf("containers are left: %v", list)
		}

		b := newFixture(t)
		b.onBucket(store, "b")
		b.start(stored(2), false)
		b.until("running", nodev1.SessionStatus_RUNNING)
		if data, err := os.ReadFile(b.file("f")); string(data) != "work" {
			t.Errorf("on the other node: %q, %v", data, err)
		}
	})
}

func TestFencedSessionEnds(t *testing.T) {
	needRoot(t)
	inBubble(t, func(t *testing.T) {
		store := objstore.NewMemory()
		a, b := newFixture(t), newFixture(t)
		a.onBucket(store, "a")
		a.start(stored(1), false)
		a.until("running", nodev1.SessionStatus_RUNNING)
		b.onBucket(store, "b")
		b.start(stored(2), false)
		b.until("running", nodev1.SessionStatus_RUNNING)
		s := a.until("failed", nodev1.SessionStatus_FAILED)
		if s.GetReason() != worker.ReasonFenced {
			t.Errorf("the one before says %v", s)
		}
		if list, _ := a.fake.List(t.Context()); len(list) != 0 {
			t.Errorf("its container runs on: %v", list)
		}
		// And is gone from there once the server says so.
		a.worker.Assign(nil)
		settle(time.Minute)
		if _, err := os.Stat(filepath.Dir(a.file(""))); !os.IsNotExist(err) {
			t.Errorf("its files are left: %v", err)
		}
		if b.last().GetState() != nodev1.SessionStatus_RUNNING {
			t.Errorf("the new one: %v", b.last())
		}
	})
}

func TestObjectStoreAway(t *testing.T) {
	needRoot(t)
	inBubble(t, func(t *testing.T) {
		store := objstore.NewMemory()
		var down atomic.Bool
		down.Store(true)
		store.Fail = func(string, string) error {
			if down.Load() {
				return objstore.ErrUnavailable
			}
			return nil
		}
		a := newFixture(t)
		a.onBucket(store, "a")
		a.start(stored(1), false)
		settle(3 * time.Second)
		if s := a.last(); s.GetState() != nodev1.SessionStatus_STARTING || s.GetReason() != worker.ReasonStorageUnreachable {
			t.Errorf("a session that cannot be brought here: %v", s)
		}
		down.Store(false)
		a.until("running", nodev1.SessionStatus_RUNNING)
		if err := os.WriteFile(a.file("f"), []byte("work"), 0o644); err != nil {
			t.Fatal(err)
		}
		down.Store(true)
		settle(time.Minute)
		if s := a.last(); s.GetState() != nodev1.SessionStatus_RUNNING || s.GetStorage().GetUnsavedSince() == nil {
			t.Errorf("while the object store is away: %v", s)
		}
		// Its container dies: it starts again from what is here.
		a.fake.Exit("s1", 1, false)
		settle(10 * time.Second)
		if s := a.last(); s.GetState() != nodev1.SessionStatus_RUNNING {
			t.Errorf("after its container has died: %v", s)
		}
		suspended := stored(1)
		suspended.DesiredState = nodev1.Assignment_SUSPEND
		a.worker.Assign(suspended)
		settle(time.Minute)
		if s := a.last(); s.GetState() != nodev1.SessionStatus_SUSPENDING || s.GetReason() != worker.ReasonStorageUnreachable {
			t.Errorf("suspended without object store: %v", s)
		}
		if data, _ := os.ReadFile(a.file("f")); string(data) != "work" {
			t.Errorf("what is not saved is gone: %q", data)
		}
		down.Store(false)
		a.until("suspended", nodev1.SessionStatus_SUSPENDED)
	})
}
