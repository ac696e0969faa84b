package checkpoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// random is text that does not compress and is like no other.
func random(seed uint64, n int) string {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return string(b)
}

// Every single request of a checkpoint fails once, or is done and its answer lost.
// Then the newest checkpoint is still a whole one, and the next Save makes good.
func TestEveryRequestMayFail(t *testing.T) {
	for _, lost := range []bool{false, true} {
		for n := 1; ; n++ {
			m := objstore.NewMemory()
			var left atomic.Int64
			left.Store(-1)
			hit := func(op, key string) error {
				if left.Add(-1) == 0 {
					return fmt.Errorf("%w: injected into %s %s", objstore.ErrUnavailable, op, key)
				}
				return nil
			}
			if lost {
				m.FailAfter = hit
			} else {
				m.Fail = hit
			}
			r := newRig(t, m, nil)
			r.put("a", "one")
			r.put("b", "same")
			r.put("z/large", random(1, 9<<20))
			first := r.save()
			before := describe(t, r.o.Dir)
			r.put("a", "two")
			r.put("z/large", random(2, 9<<20))
			must(t, os.Chmod(r.path("b"), 0o4711)) // sends nothing: it must not be forgotten either
			left.Store(int64(n))
			info, err := r.w.Save(t.Context(), noFreeze, Meta{})
			failed := left.Load() <= 0
			left.Store(-1)
			if err != nil && !errors.Is(err, objstore.ErrUnavailable) {
				t.Fatalf("request %d, answer lost %v: %v", n, lost, err)
			}
			head, e := r.s.Head(t.Context())
			must(t, e)
			switch {
			case err == nil && head.Manifest != info.ID:
				t.Fatalf("request %d, answer lost %v: head is %s, not %s", n, lost, head.Manifest, info.ID)
			case head.Manifest == first.ID:
				same(t, r.restored(""), before)
			default:
				r.check()
			}
			sent := m.Stats().BytesIn
			r.reopen(true)
			r.save()
			if again := m.Stats().BytesIn - sent; again > 10<<20 {
				t.Errorf("request %d, answer lost %v: %d bytes after the failure", n, lost, again)
			}
			r.check()
			must(t, r.s.Check(t.Context(), ""))
			must(t, r.w.Close())
			if !failed {
				if n < 4 {
					t.Errorf("only %d requests: nothing was tried", n)
				}
				break
			}
		}
	}
}

// An upload that was cut off half way goes on where it was, also in a new process
// that lost its cache but not its journal.
func TestUploadsResume(t *testing.T) {
	m := objstore.NewMemory()
	var packs atomic.Int64
	m.Fail = func(op, key string) error {
		if op == objstore.OpPut && strings.Contains(key, "/packs/") && packs.Add(1) > 5 {
			return objstore.ErrUnavailable
		}
		return nil
	}
	r := newRig(t, m, nil)
	const size = 60 << 20
	r.put("large", random(3, size))
	if _, err := r.w.Save(t.Context(), noFreeze, Meta{}); !errors.Is(err, objstore.ErrUnavailable) {
		t.Fatal(err)
	}
	arrived := m.Stats().BytesIn
	if arrived < 20<<20 {
		t.Fatalf("only %d bytes arrived", arrived)
	}
	must(t, r.w.Close())
	must(t, os.Remove(r.o.StateDir+"/"+cacheFile))
	m.Fail = nil
	r.open()
	r.save()
	if all := m.Stats().BytesIn; all > size+(2<<20) {
		t.Errorf("%d bytes sent for %d: what had arrived was sent again", all, size)
	}
	r.check()
}

// A damaged cache or journal only costs time.
func TestDamagedStateOnlyCostsTime(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("a", random(1, 200_000))
	id := r.save().ID
	for i := range 40 {
		must(t, r.w.Close())
		for _, name := range []string{cacheFile, journalFile} {
			text, err := os.ReadFile(r.o.StateDir + "/" + name)
			must(t, err)
			if len(text) > 0 {
				text[len(text)*i/40] ^= 1
			}
			must(t, os.WriteFile(r.o.StateDir+"/"+name, text, 0o600))
		}
		r.open()
		if again := r.save(); again.ID != id {
			t.Fatalf("byte %d/40: %+v", i, again)
		}
	}
	r.check()
}

// The checkpoint is exactly the tree as it was while the session stood still.
func TestFrozenInstant(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	for i := range 200 {
		r.put(fmt.Sprintf("d%d/f%d", i%10, i), "0")
	}
	var freeze sync.Mutex
	stop := make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		freeze.Lock()
		f, err := os.OpenFile(r.path("db"), os.O_CREATE|os.O_RDWR, 0o600)
		freeze.Unlock()
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			freeze.Lock()
			p := r.path(fmt.Sprintf("d%d/f%d", i%10, i%200))
			switch i % 5 {
			case 0:
				err = os.Remove(p)
			case 1:
				err = os.WriteFile(p+"x", []byte(random(uint64(i), 3000)), 0o600)
			case 2:
				_, err = f.WriteAt([]byte(random(uint64(i), 4096)), int64(i%100)*4096)
			case 3:
				err = os.Rename(p, r.path(fmt.Sprintf("d%d/r%d", (i+1)%10, i)))
			default:
				err = os.WriteFile(p, []byte(fmt.Sprint(i)), 0o600)
			}
			freeze.Unlock()
			if err != nil && !os.IsNotExist(err) {
				t.Error(err)
				return
			}
		}
	})
	was := map[string]string{}
	for range 12 {
		var frozen string
		info, err := r.w.Save(t.Context(), func(context.Context) (func() error, error) {
			freeze.Lock()
			frozen = describe(t, r.o.Dir)
			return func() error { freeze.Unlock(); return nil }, nil
		}, Meta{})
		must(t, err)
		was[info.ID] = frozen
	}
	close(stop)
	g.Wait()
	if len(was) < 5 {
		t.Errorf("only %d checkpoints", len(was))
	}
	for id, want := range was {
		same(t, r.restored(id), want)
	}
}

// Much that changes between the walk and the freeze is saved before another freeze,
// and at last taken whatever it is.
func TestLargeDelta(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.o.deltaMax = 2 << 20
	r.reopen(true)
	freezes := 0
	_, err := r.w.Save(t.Context(), func(context.Context) (func() error, error) {
		freezes++
		for i := range 3 {
			r.put(fmt.Sprintf("f%d", i), random(uint64(freezes*10+i), 900_000*(i+1)))
		}
		return func() error { return nil }, nil
	}, Meta{})
	must(t, err)
	if freezes != freezesMax || r.w.Stats().Freezes != freezes {
		t.Errorf("%d freezes", freezes)
	}
	r.check()
}

// A thaw follows every freeze, also when all goes wrong.
func TestThawAlways(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", "b")
	ctx, cancel := context.WithCancel(t.Context())
	thawed := 0
	freeze := func(context.Context) (func() error, error) {
		cancel()
		return func() error { thawed++; return nil }, nil
	}
	if _, err := r.w.Save(ctx, freeze, Meta{}); !errors.Is(err, context.Canceled) || thawed != 1 {
		t.Errorf("%v, thawed %d times", err, thawed)
	}
	broken := errors.New("cgroup gone")
	if _, err := r.w.Save(t.Context(), func(context.Context) (func() error, error) { return nil, broken }, Meta{}); !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := r.w.Save(t.Context(), func(context.Context) (func() error, error) { return func() error { return broken }, nil }, Meta{}); !errors.Is(err, broken) {
		t.Error(err)
	}
	r.save()
	r.check()
}

// An old owner goes on: it may write what it wants, but nothing of it counts.
func TestStaleOwner(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", "of the old owner")
	r.save()

	owner2 := Owner{SessionID: "s", SessionUID: "u1", Node: "n2", Instance: "i2", Generation: 2}
	if _, _, err := r.s.Acquire(t.Context(), owner2); err != nil {
		t.Fatal(err)
	}
	r2 := &rig{t: t, store: m, repo: r.repo, s: r.s, o: WriterOptions{Dir: t.TempDir(), StateDir: t.TempDir(), Owner: owner2}}
	r2.open()
	r2.put("a", "of the new owner")
	r2.save()
	want := describe(t, r2.o.Dir)
	list, err := r.s.List(t.Context())
	must(t, err)
	for i := range 3 {
		r.put("a", random(uint64(i), 100_000))
		if _, err := r.w.Save(t.Context(), noFreeze, Meta{}); !errors.Is(err, ErrFenced) {
			t.Fatal(err)
		}
		must(t, r.w.Close())
	}
	for name, err := range map[string]error{
		"Verify": r.s.Verify(t.Context(), owner1), "Release": r.s.Release(t.Context(), owner1, true),
	} {
		if !errors.Is(err, ErrFenced) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.s.Retain(t.Context(), owner1, Policy{}); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	if _, _, err := r.s.Acquire(t.Context(), owner1); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	if _, err := r.s.NewWriter(t.Context(), r.o); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	same(t, r2.restored(""), want)
	after, err := r.s.List(t.Context())
	must(t, err)
	if len(after) != len(list) {
		t.Errorf("%d checkpoints, before the stale owner's attempts %d", len(after), len(list))
	}
	must(t, r2.s.Verify(t.Context(), owner2))
}

// A write of the head that comes through after it was given up is the owner's own.
func TestLateHeadWrite(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", "1")
	r.save()
	m.Fail = func(op, key string) error {
		if op == objstore.OpPut && strings.HasSuffix(key, "/head") {
			return objstore.ErrUnavailable
		}
		return nil
	}
	r.put("a", "2")
	if _, err := r.w.Save(t.Context(), noFreeze, Meta{}); !errors.Is(err, objstore.ErrUnavailable) {
		t.Fatal(err)
	}
	m.Fail = nil
	h, text, err := r.s.head(t.Context())
	must(t, err)
	// The same owner's head, other than the writer knows it.
	_, err = m.Put(t.Context(), r.s.headKey(), bytes.Replace(text, []byte(`"write": "`), []byte(`"write": "f`), 1), objstore.PutOptions{IfMatch: h.etag})
	must(t, err)
	r.save()
	r.check()
}

// What the owner before saves between a look at the head and the takeover is in what
// the takeover says that it found.
func TestTakeoverFindsTheLastSave(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", "1")
	r.save()
	r.put("a", "2")
	var last Info
	var busy bool
	m.Fail = func(op, key string) error {
		if op == objstore.OpPut && strings.HasSuffix(key, "/head") && !busy {
			busy = true
			last = r.save()
		}
		return nil
	}
	owner2 := Owner{SessionID: "s", SessionUID: "u1", Node: "n2", Instance: "i2", Generation: 2}
	before, existed, err := r.s.Acquire(t.Context(), owner2)
	must(t, err)
	if !existed || before.Manifest != last.ID || before.Owner != owner1 {
		t.Errorf("%v %+v, the last save was %s", existed, before, last.ID)
	}
	again, existed, err := r.s.Acquire(t.Context(), owner2)
	must(t, err)
	if !existed || again.Owner != owner2 || again.Manifest != last.ID {
		t.Errorf("%v %+v", existed, again)
	}
	if before, existed, err := r.repo.Session("new").Acquire(t.Context(), owner1); err != nil || existed || before.Manifest != "" {
		t.Errorf("%v %v %+v", err, existed, before)
	}
}

// A bucket that somebody has emptied is no other owner. Acquired anew, all of the
// session is sent again: nothing that was sent before is relied on.
func TestHeadIsMissing(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", random(1, 300_000))
	r.put("b/c", "2")
	r.save()
	must(t, m.Delete(t.Context(), m.Keys()...))
	r.put("d", random(2, 300_000))
	_, saveErr := r.w.Save(t.Context(), noFreeze, Meta{})
	_, writerErr := r.s.NewWriter(t.Context(), r.o)
	for name, err := range map[string]error{
		"Verify": r.s.Verify(t.Context(), owner1), "Release": r.s.Release(t.Context(), owner1, true), "Save": saveErr, "NewWriter": writerErr,
	} {
		if !errors.Is(err, ErrNotFound) || errors.Is(err, ErrFenced) || !strings.Contains(err.Error(), r.s.headKey()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left := slices.DeleteFunc(m.Keys(), func(k string) bool { return !strings.Contains(k, "/sessions/") }); len(left) > 0 {
		t.Errorf("a save that found no head left %q", left)
	}
	if _, existed, err := r.s.Acquire(t.Context(), owner1); err != nil || existed {
		t.Fatalf("%v, %v", existed, err)
	}
	r.reopen(true)
	r.save()
	r.check()
	must(t, r.s.Check(t.Context(), ""))
}

func TestHeadTakeover(t *testing.T) {
	ctx := t.Context()
	repo, err := Open(objstore.NewMemory(), "", nil)
	must(t, err)
	s := repo.Session("x/y")
	o := func(uid, node string, gen uint64) Owner { return Owner{"x", uid, node, node, gen} }
	if _, err := s.Head(ctx); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	for i, step := range []struct {
		o       Owner
		release bool
		fenced  bool
	}{
		{o: o("u", "a", 3)},
		{o: o("u", "a", 3)},
		{o: o("u", "b", 3), fenced: true},
		{o: o("u", "b", 2), fenced: true},
		{o: o("v", "b", 1), fenced: true},
		{o: o("u", "b", 4), release: true},
		{o: o("u", "c", 3), fenced: true},
		{o: o("u", "c", 4)},
		{o: o("u", "b", 4), fenced: true},
		{o: o("u", "c", 4), release: true},
		// Another session on its prefix, and who is late of the one or the other.
		{o: o("v", "d", 4), fenced: true},
		{o: o("v", "d", 5)},
		{o: o("u", "c", 6), fenced: true},
		{o: o("v", "d", 5), release: true},
		{o: o("u", "c", 4), fenced: true},
		{o: o("w", "e", 6)},
	} {
		_, _, err := s.Acquire(ctx, step.o)
		if errors.Is(err, ErrFenced) != step.fenced || err != nil && !step.fenced {
			t.Errorf("step %d: %v", i, err)
		}
		if step.release {
			must(t, s.Release(ctx, step.o, i > 5))
			must(t, s.Release(ctx, step.o, i > 5))
		}
	}
	h, err := s.Head(ctx)
	must(t, err)
	if h.Released || !h.DeleteTime.IsZero() || time.Since(h.Time) > time.Minute {
		t.Errorf("%+v", h)
	}
}

// A purge takes the session first, so that nobody writes into what it removes, and
// leaves a head that late owners find.
func TestPurgeFences(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("a", "1")
	r.save()
	end := Owner{SessionID: "s", SessionUID: "u1", Generation: 2}
	for name, o := range map[string]Owner{
		"same generation": {SessionID: "s", SessionUID: "u1", Generation: 1},
		"another session": {SessionID: "s", SessionUID: "u2", Generation: 2},
	} {
		if err := r.s.Retire(t.Context(), o, false); !errors.Is(err, ErrFenced) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, r.s.Verify(t.Context(), owner1))
	if err := r.s.Purge(t.Context(), end); !errors.Is(err, ErrFenced) {
		t.Errorf("a purge of what it does not own: %v", err)
	}
	r.check()
	must(t, r.s.Retire(t.Context(), end, false))
	must(t, r.s.Retire(t.Context(), end, false))
	if err := r.s.Verify(t.Context(), owner1); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	taken := Owner{SessionID: "s", SessionUID: "u2", Node: "n", Instance: "i", Generation: 3}
	if _, _, err := r.s.Acquire(t.Context(), taken); !errors.Is(err, ErrFenced) {
		t.Errorf("taken in the middle of a purge: %v", err)
	}
	r.check()
	must(t, r.s.Purge(t.Context(), end))
	must(t, r.s.Purge(t.Context(), end))
	if h, err := r.s.Head(t.Context()); err != nil || !h.Purged() || h.Owner != end || len(keys(t, r.store, r.s.manifests())) > 0 {
		t.Errorf("%+v, %v", h, err)
	}
	for range r.repo.Sessions(t.Context()) {
		t.Error("a purged session is listed")
	}
	for _, late := range []Owner{owner1, {SessionID: "s", SessionUID: "u0", Node: "n", Instance: "i", Generation: 2}} {
		if _, _, err := r.s.Acquire(t.Context(), late); !errors.Is(err, ErrFenced) {
			t.Errorf("%s: %v", late, err)
		}
	}
	if _, _, err := r.s.Acquire(t.Context(), taken); err != nil {
		t.Error(err)
	}
	if err := r.s.Purge(t.Context(), end); !errors.Is(err, ErrFenced) {
		t.Errorf("purged again when another has it: %v", err)
	}
	// Let go of for now, by the owner of a session that was recovered elsewhere.
	moved := Owner{SessionID: "s", SessionUID: "u2", Node: "n", Instance: "i", Generation: 4}
	if _, _, err := r.s.Acquire(t.Context(), moved); err != nil {
		t.Error(err)
	}
	must(t, r.s.Release(t.Context(), moved, false))
	if err := r.s.Retire(t.Context(), Owner{SessionID: "s", SessionUID: "u2", Generation: 4}, true); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
}

// settled waits until a file's stamp is old enough to be believed.
func settled(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		if !sigOf(&st).racy() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is stamped %d, now it is %d", path, st.Ctim.Nano(), time.Now().UnixNano())
		}
		<-time.After(time.Millisecond)
	}
}

// A page that is written through a mapping, saved, and written again has its file
// read again, though nothing but memory was touched.
func TestMappedWrites(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	var fs unix.Statfs_t
	must(t, unix.Statfs(r.o.Dir, &fs))
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("tmpfs has no write-back")
	}
	f, err := os.Create(r.path("mapped"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(256<<10))
	mem, err := unix.Mmap(int(f.Fd()), 0, 256<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(mem)
	for i := range 5 {
		mem[5000] = byte('a' + i)
		settled(t, r.path("mapped"))
		// Nothing may write the page back but Save itself: no restore in here.
		if info := r.save(); info.Unchanged {
			t.Fatalf("write %d was missed", i)
		}
	}
	r.check()
}

// What a walk has seen before it failed still counts as changed for the next.
func TestChangesOutliveAFailure(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	r.o.Exclude = func(rel string, _ bool) bool {
		if rel == "b" {
			cancel()
		}
		return rel == "b"
	}
	r.reopen(true)
	r.put("a", "same")
	for i := range 400 { // the context is looked at every so many names
		r.put(fmt.Sprintf("c%d", i), "same")
	}
	old := time.Unix(1_000_000, 0)
	must(t, os.Chtimes(r.o.Dir, old, old))
	settled(t, r.o.Dir)
	r.save()
	must(t, os.Chmod(r.path("a"), 0o711))
	settled(t, r.path("a")) // else it is looked at again anyway
	r.put("b", "")
	if _, err := r.w.Save(ctx, noFreeze, Meta{}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	must(t, os.Remove(r.path("b")))
	must(t, os.Chtimes(r.o.Dir, old, old))
	r.save()
	r.check()
}
