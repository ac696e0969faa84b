package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// forger writes checkpoints that no writer would, as whoever has a bucket's keys may.
type forger struct {
	*rig
	id string
	m  *Manifest
	p  *packer
}

func newForger(t *testing.T) *forger {
	t.Helper()
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("a", "x")
	f := &forger{rig: r, id: r.save().ID}
	m, err := r.s.Manifest(t.Context(), f.id)
	must(t, err)
	f.m = m
	f.p = r.repo.newPacker(t.Context(), map[chunkID]*chunk{}, func(*pack, []packBlock) {})
	return f
}

func (f *forger) chunk(text []byte) *chunk {
	f.t.Helper()
	c, err := f.p.add(kindMeta, f.repo.crypt.id(text), text)
	must(f.t, errors.Join(err, f.p.flush()))
	return c
}

// segment of entries, which begin with the tree's own folder if first.
func (f *forger) segment(first bool, entries ...entry) *chunk {
	f.t.Helper()
	enc := newEncoder()
	if first {
		enc.entry(&entry{kind: kindDir, mode: 0o755})
	}
	for i := range entries {
		enc.entry(&entries[i])
	}
	return f.chunk(enc.bytes())
}

func (f *forger) list(ext ...extent) *chunk {
	f.t.Helper()
	enc := newEncoder()
	for _, x := range ext {
		enc.extent(x)
		enc.count++
	}
	return f.chunk(enc.bytes())
}

// open replaces the checkpoint by one of these segments, and opens it.
func (f *forger) open(files int64, segments ...*chunk) error {
	f.t.Helper()
	must(f.t, f.p.finish())
	f.p.close()
	f.m.Files, f.m.segments, f.m.packs = files, segments, f.p.packs
	return f.manifest()
}

func (f *forger) manifest() error {
	f.t.Helper()
	text, err := f.repo.crypt.encodeManifest(f.m)
	must(f.t, err)
	_, err = f.store.Put(f.t.Context(), f.s.key(f.id), text, objstore.PutOptions{})
	must(f.t, err)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _, err = f.s.open(f.t.Context(), f.id)
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 512<<20 {
		f.t.Errorf("%d MiB were taken for it", n>>20)
	}
	return err
}

func wantDamaged(t *testing.T, err error, words string) {
	t.Helper()
	if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), words) {
		t.Errorf("%v, want damage: %s", err, words)
	}
}

// A few bytes that say that there is very much.
func TestForgedTrees(t *testing.T) {
	dir := func(path string) entry { return entry{path: path, kind: kindDir, mode: 0o755} }
	t.Run("honest", func(t *testing.T) {
		f := newForger(t)
		must(t, f.open(3, f.segment(true, dir("a")), f.segment(false, dir("b"))))
	})
	t.Run("one segment many times", func(t *testing.T) {
		f := newForger(t)
		var all []entry
		for i := range 1000 {
			all = append(all, dir(fmt.Sprintf("%04d", i)))
		}
		segs := []*chunk{f.segment(true, dir("!"))}
		again := f.segment(false, all...)
		for range 20_000 {
			segs = append(segs, again)
		}
		wantDamaged(t, f.open(20_000_000, segs...), "")
		// A second one of the same entries has another text and place.
		f = newForger(t)
		more := append([]entry(nil), all...)
		more[999].mtime = 1
		wantDamaged(t, f.open(2001, f.segment(true), f.segment(false, all...), f.segment(false, more...)), "out of order")
	})
	t.Run("out of order in a segment", func(t *testing.T) {
		f := newForger(t)
		wantDamaged(t, f.open(3, f.segment(true, dir("b"), dir("a"))), "out of order")
	})
	t.Run("more or less than it says", func(t *testing.T) {
		f := newForger(t)
		wantDamaged(t, f.open(2, f.segment(true, dir("a"), dir("b"))), "more entries than the 2")
		f = newForger(t)
		wantDamaged(t, f.open(4, f.segment(true, dir("a"), dir("b"))), "3 entries, not 4")
	})
	t.Run("long paths that share much", func(t *testing.T) {
		f := newForger(t)
		long := strings.Repeat(strings.Repeat("d", 255)+"/", 2000)
		var all []entry
		for i := range 1000 {
			all = append(all, dir(long+fmt.Sprintf("%04d", i)))
		}
		wantDamaged(t, f.open(1001, f.segment(true, all...)), "paths are too long")
	})
	t.Run("a list of holes many times", func(t *testing.T) {
		f := newForger(t)
		holes := make([]extent, 1<<20)
		for i := range holes {
			holes[i].hole = 1
		}
		e := entry{path: "a", kind: kindFile, lists: true, size: 40 << 20}
		for l := f.list(holes...); len(e.ext) < 40; {
			e.ext = append(e.ext, extent{c: l})
		}
		wantDamaged(t, f.open(2, f.segment(true, e)), "parts of")
		// One in each list.
		f = newForger(t)
		e.ext, e.size = nil, 2
		for l := f.list(extent{hole: 1}); len(e.ext) < 2; {
			e.ext = append(e.ext, extent{c: l})
		}
		wantDamaged(t, f.open(2, f.segment(true, e)), "parts of")
	})
	t.Run("lists of more than the file", func(t *testing.T) {
		f := newForger(t)
		x := extent{c: f.chunk([]byte("some text"))}
		e := entry{path: "a", kind: kindFile, lists: true, size: 10}
		for l := f.list(x, x, x); len(e.ext) < 1000; {
			e.ext = append(e.ext, extent{c: l})
		}
		wantDamaged(t, f.open(2, f.segment(true, e)), "more than its size")
	})
	t.Run("attributes that are the machine's", func(t *testing.T) {
		for _, name := range []string{"trusted.overlay.opaque", "security.selinux", "security.ima", "system.other", "user", ""} {
			f := newForger(t)
			e := entry{path: "a", kind: kindFile, xattrs: []xattr{{name, "y"}}}
			wantDamaged(t, f.open(2, f.segment(true, e)), "never saved")
			_, err := f.s.Restore(t.Context(), f.id, RestoreOptions{Dir: filepath.Join(t.TempDir(), "out")})
			wantDamaged(t, err, "never saved")
		}
	})
	t.Run("notes", func(t *testing.T) {
		f := newForger(t)
		f.m.Notes = []string{strings.Repeat("{", 2000)}
		for len(f.m.Notes) <= maxNotes {
			f.m.Notes = append(f.m.Notes, f.m.Notes[0])
		}
		must(t, f.manifest())
		list, err := f.s.List(t.Context())
		must(t, err)
		for _, n := range list[0].Notes {
			if len(n) > maxNote+10 {
				t.Errorf("a note of %d bytes", len(n))
			}
		}
		f.m.Notes = append(f.m.Notes, "one more")
		wantDamaged(t, f.manifest(), "52 notes")
	})
	t.Run("a manifest of empty objects", func(t *testing.T) {
		f := newForger(t)
		body := fmt.Appendf(nil, `{"version":1,"id":%q,"session":"s","segments":[{}%s]}`, f.id, strings.Repeat(",{}", 10<<20))
		var err error
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = f.repo.crypt.decodeBody("s", f.id, nil, nil, f.repo.crypt.seal("manifest", nil, body))
		runtime.ReadMemStats(&after)
		wantDamaged(t, err, "too many objects")
		if n := after.TotalAlloc - before.TotalAlloc; n > 256<<20 {
			t.Errorf("%d MiB were taken", n>>20)
		}
	})
	t.Run("a huge head", func(t *testing.T) {
		f := newForger(t)
		_, err := f.store.Put(t.Context(), f.s.headKey(), make([]byte, maxHead+1), objstore.PutOptions{})
		must(t, err)
		_, err = f.s.Head(t.Context())
		wantDamaged(t, err, "")
	})
}

// A writer makes nothing that is more than a reader takes: it says so.
func TestTreeBounds(t *testing.T) {
	for words, s := range map[string]treeSize{
		"files": {entries: maxEntries}, "parts": {extents: maxExtents}, "paths": {paths: maxPaths},
	} {
		must(t, s.check())
		e := entry{path: "p", kind: kindFile, size: 2, lists: true, ext: []extent{{hole: 2}}}
		g := &segmenter{enc: newEncoder(), m: &Manifest{}, size: s}
		if err := g.entry(&e); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", words, err)
		}
		if err := s.add([]entry{e}); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", words, err)
		}
	}
	f := newForger(t)
	l := f.list(extent{c: f.chunk([]byte("xy"))})
	must(t, f.p.finish())
	f.p.close()
	all := []entry{{path: "a", kind: kindFile, size: 2, lists: true, ext: []extent{{c: l}}}}
	m := &Manifest{Info: Info{ID: f.id}, cat: newCatalog()}
	err := f.s.flatten(t.Context(), m, all, &treeSize{extents: maxExtents})
	wantDamaged(t, err, "parts")
}

// One text over and over makes one list over and over, which is right.
func TestRepeatedLists(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	page := []byte(random(1, 32<<10))
	f, err := os.Create(r.path("db"))
	must(t, err)
	_, err = f.WriteString("SQLite format 3\x00")
	must(t, err)
	for i := range 5000 {
		_, err := f.WriteAt(page, int64(i+1)*int64(len(page)))
		must(t, err)
	}
	must(t, f.Close())
	r.save()
	_, all, err := r.s.open(t.Context(), "")
	must(t, err)
	raw, err := r.s.entries(t.Context(), r.w.base, false)
	must(t, err)
	lists := map[chunkID]int{}
	for _, x := range raw[1].ext {
		lists[x.c.id]++
	}
	if len(all[1].ext) < 5000 || len(lists) == len(raw[1].ext) {
		t.Fatalf("%d parts in %d lists, %d of them different", len(all[1].ext), len(raw[1].ext), len(lists))
	}
	r.check()
	r.reopen(false)
	if info := r.save(); !info.Unchanged {
		t.Error("read again, it is another")
	}
}
