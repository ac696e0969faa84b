package checkpoint

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
)

func keys(t testing.TB, s objstore.Store, prefix string) (all []string) {
	t.Helper()
	for o, err := range s.List(t.Context(), prefix, "", "") {
		must(t, err)
		all = append(all, o.Key)
	}
	return all
}

// Every object of a checkpoint is damaged in turn, in several ways: that is found
// and named, no wrong tree is restored, and the checkpoint before still is.
func TestDamageIsFoundAndNamed(t *testing.T) {
	for _, key := range [][]byte{nil, bytes.Repeat([]byte{1}, 32)} {
		m := objstore.NewMemory()
		r := newRig(t, m, key)
		r.put("keep", random(1, 100_000))
		first := r.save()
		before := describe(t, r.o.Dir)
		old := keys(t, m, "")
		r.put("more", random(2, 300_000))
		r.put("keep", random(3, 1000))
		second := r.save()
		for _, k := range keys(t, m, "") {
			if slices.Contains(old, k) {
				continue
			}
			text, _, err := m.Get(t.Context(), k)
			must(t, err)
			flip := func(at int) []byte {
				b := bytes.Clone(text)
				b[at] ^= 0x20
				return b
			}
			damages := map[string][]byte{"empty": {}, "half": text[:len(text)/2], "longer": append(bytes.Clone(text), 0), "gone": nil}
			for i := range 24 {
				damages[fmt.Sprintf("bit in byte %d/24", i)] = flip(len(text) * i / 24)
			}
			damages["last byte"] = flip(len(text) - 1)
			for name, bad := range damages {
				if bad == nil {
					must(t, m.Delete(t.Context(), k))
				} else if _, err := m.Put(t.Context(), k, bad, objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
				err := r.s.Check(t.Context(), second.ID)
				manifestGone := name == "gone" && strings.Contains(k, "/manifests/")
				switch {
				case manifestGone && errors.Is(err, ErrNotFound):
				case errors.Is(err, ErrKey) && strings.Contains(err.Error(), k): // the bits that say which key
				case !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), k):
					t.Fatalf("%s, %s: check says %v", k, name, err)
				}
				dir := filepath.Join(t.TempDir(), "out")
				if _, err := r.s.Restore(t.Context(), second.ID, RestoreOptions{Dir: dir}); err == nil {
					same(t, describe(t, dir), describe(t, r.o.Dir)) // damage where a restore does not look
				} else if _, err := os.Lstat(dir); !os.IsNotExist(err) {
					t.Fatalf("%s, %s: a failed restore left a tree", k, name)
				}
			}
			same(t, r.restored(first.ID), before)
			if _, err := m.Put(t.Context(), k, text, objstore.PutOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		must(t, r.s.Check(t.Context(), second.ID))
		r.check()
	}
}

// A writer whose last checkpoint is damaged makes a whole new one.
func TestSaveOverDamage(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", random(1, 100_000))
	r.save()
	for _, k := range keys(t, m, "root/.cloudcode/v1/packs/") {
		must(t, m.Delete(t.Context(), k))
	}
	r.reopen(false)
	r.put("b", "new")
	r.save()
	r.check()
}

func TestEncryption(t *testing.T) {
	m := objstore.NewMemory()
	key := bytes.Repeat([]byte{9}, 32)
	r := newRig(t, m, key)
	const secret = "a very secret text that nobody may read"
	r.put("secret-name.txt", secret)
	info, err := r.w.Save(t.Context(), noFreeze, Meta{Trigger: "turn", SessionJSON: []byte(`{"env":"hidden-value"}`)})
	must(t, err)
	r.check()
	for _, k := range keys(t, m, "") {
		text, _, err := m.Get(t.Context(), k)
		must(t, err)
		for _, plain := range []string{secret[:12], "secret-name", "hidden"} {
			if bytes.Contains(text, []byte(plain)) {
				t.Errorf("%s shows %q", k, plain)
			}
		}
	}
	other := bytes.Clone(key)
	other[31] ^= 1
	for _, wrong := range [][]byte{nil, other} {
		repo, err := Open(m, "root", wrong)
		must(t, err)
		if _, err := repo.Session("s").Manifest(t.Context(), info.ID); !errors.Is(err, ErrKey) {
			t.Error(err)
		}
		if _, err := repo.Session("s").NewWriter(t.Context(), r.o); !errors.Is(err, ErrKey) {
			t.Error(err)
		}
		// Garbage collection needs no key.
		if st, err := repo.CollectGarbage(t.Context(), GCOptions{Grace: time.Nanosecond}); err != nil || st.Deleted != 0 {
			t.Errorf("%+v %v", st, err)
		}
	}
	// A manifest of another session does not pass for this one's.
	text, _, err := m.Get(t.Context(), r.s.key(info.ID))
	must(t, err)
	if _, err := m.Put(t.Context(), r.repo.Session("t").key(info.ID), text, objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.repo.Session("t").Manifest(t.Context(), info.ID); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	plain, err := Open(objstore.NewMemory(), "", key[:31])
	if plain != nil || !errors.Is(err, ErrKey) {
		t.Error(err)
	}
	// Where a key is given, what is not encrypted is not believed.
	m2 := objstore.NewMemory()
	r2 := newRig(t, m2, nil)
	r2.put("a", "b")
	r2.save()
	strict, err := Open(m2, "root", key)
	must(t, err)
	if _, err := strict.Session("s").Restore(t.Context(), "", RestoreOptions{Dir: filepath.Join(t.TempDir(), "x")}); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
}

func TestFork(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", random(1, 300_000))
	id := r.save().ID
	want := describe(t, r.o.Dir)
	r.put("a", "later")
	r.save()
	dst := r.repo.Session("forks/one")
	maker := Owner{SessionID: "one", SessionUID: "u9"}
	sent := m.Stats().BytesIn
	info, err := dst.CopyFrom(t.Context(), r.s, id, maker, Meta{Trigger: "fork", SessionJSON: []byte("{}")})
	must(t, err)
	if n := m.Stats().BytesIn - sent; n > 10_000 {
		t.Errorf("a fork sent %d bytes", n)
	}
	if _, err := dst.CopyFrom(t.Context(), r.s, id, maker, Meta{}); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	must(t, r.s.Purge(t.Context()))
	if st, err := r.repo.CollectGarbage(t.Context(), GCOptions{Grace: time.Nanosecond}); err != nil || st.Deleted == 0 {
		t.Errorf("%+v %v", st, err)
	}
	o := Owner{SessionID: "one", SessionUID: "u9", Node: "n", Instance: "i", Generation: 1}
	if _, _, err := dst.Acquire(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "out")
	got, err := dst.Restore(t.Context(), "", RestoreOptions{Dir: dir})
	must(t, err)
	if got.ID != info.ID || got.Parent != id || got.Trigger != "fork" {
		t.Errorf("%+v", got.Info)
	}
	same(t, describe(t, dir), want)
	var found []string
	for st, err := range r.repo.Sessions(t.Context()) {
		must(t, errors.Join(err, st.Err))
		found = append(found, st.Prefix+" "+st.Manifest.ID)
	}
	if len(found) != 1 || found[0] != "forks/one "+info.ID {
		t.Errorf("%q", found)
	}
	if _, err := m.Put(t.Context(), r.repo.Session("broken").headKey(), []byte("{"), objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	bad := 0
	for st, err := range r.repo.Sessions(t.Context()) {
		must(t, err)
		if errors.Is(st.Err, ErrDamaged) && st.Prefix == "broken" {
			bad++
		}
	}
	if bad != 1 {
		t.Error("a damaged head is not said")
	}
}

func TestFind(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	if _, err := r.s.Find(t.Context(), ""); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	r.put("a", "1")
	first := r.save().ID
	r.put("a", "2")
	second := r.save().ID
	for text, want := range map[string]string{"": second, first: first, first[:len(first)-3]: first, "2": "", "x": ""} {
		got, err := r.s.Find(t.Context(), text)
		if got != want || (want == "") != errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %q %v", text, got, err)
		}
	}
	// A manifest that never became the head's is not there.
	m := *r.w.base
	m.ID, _ = newManifestID(time.Now().Add(time.Hour), "")
	text, err := r.repo.crypt.encodeManifest(&m)
	must(t, err)
	_, err = r.store.Put(t.Context(), r.s.key(m.ID), text, objstore.PutOptions{})
	must(t, err)
	if _, err := r.s.Find(t.Context(), m.ID); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

func TestTar(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("x/y/small", "s")
	r.put("x/y/large", random(1, 3<<20))
	must(t, os.Truncate(r.path("x/y/large"), 4<<20))
	must(t, os.Link(r.path("x/y/large"), r.path("x/z")))
	must(t, os.Symlink("../..", r.path("x/y/link")))
	must(t, os.Chmod(r.path("x/y/small"), 0o4711))
	must(t, os.Chown(r.path("x/y/small"), 3, 4))
	must(t, unix.Setxattr(r.path("x/y/small"), "user.k", []byte("v"), 0))
	must(t, unix.Mkfifo(r.path("x/fifo"), 0o600))
	r.save()
	for _, sub := range []string{"", "x/y", "x/z"} {
		var b bytes.Buffer
		must(t, r.s.WriteTar(t.Context(), "", sub, &b))
		out := t.TempDir()
		cmd := exec.Command("tar", "--xattrs", "-xpf", "-", "-C", out)
		cmd.Stdin = &b
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s", text)
		}
		want := describe(t, r.path(sub))
		got := describe(t, filepath.Join(out, filepath.Base(sub)))
		if sub != "" { // only whole trees hold all names of a file
			cut := func(s string) string {
				var lines []string
				for l := range strings.SplitSeq(s, "\n") {
					l, _, _ = strings.Cut(l, " is ")
					lines = append(lines, l)
				}
				return strings.Join(lines, "\n")
			}
			want, got = cut(want), cut(got)
		}
		same(t, got, want)
	}
	if err := r.s.WriteTar(t.Context(), "", "nowhere", io.Discard); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	var b bytes.Buffer
	must(t, r.s.WriteTar(t.Context(), "", "/x/y/", &b))
	if h, err := tar.NewReader(&b).Next(); err != nil || h.Name != "y/" {
		t.Errorf("%+v %v", h, err)
	}
}

func TestRestoreRefusesWhatIsThere(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("a", "b")
	r.save()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600))
	if _, err := r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir}); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	must(t, os.Remove(filepath.Join(dir, "mine")))
	must(t, os.MkdirAll(dir+partial+"/half/a/restore", 0o700))
	var last [2]int64
	_, err := r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir, Progress: func(done, total int64) { last = [2]int64{done, total} }})
	must(t, err)
	same(t, describe(t, dir), describe(t, r.o.Dir))
	if last != [2]int64{1, 1} {
		t.Errorf("progress ended at %v", last)
	}
}

// The same over S3.
func TestOnS3(t *testing.T) {
	c := s3test.Start(t, s3test.Options{}).Bucket("checkpoints")
	store, err := objstore.Open(c.ObjStore())
	must(t, err)
	t.Cleanup(func() {
		if c, ok := store.(io.Closer); ok {
			c.Close()
		}
	})
	r := newRig(t, store, bytes.Repeat([]byte{5}, 32))
	for i := range 300 {
		r.put(fmt.Sprintf("d%d/f%d", i%7, i), random(uint64(i), i*100))
	}
	r.put("large", random(5, 20<<20))
	first := r.save()
	was := describe(t, r.o.Dir)
	r.put("d1/new", "x")
	r.save()
	r.check()
	same(t, r.restored(first.ID), was)
	must(t, r.s.Check(t.Context(), ""))
	owner2 := owner1
	owner2.Generation, owner2.Node = 2, "other"
	if _, _, err := r.s.Acquire(t.Context(), owner2); err != nil {
		t.Fatal(err)
	}
	r.put("d1/new", "y")
	if _, err := r.w.Save(t.Context(), noFreeze, Meta{}); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	if st, err := r.repo.CollectGarbage(t.Context(), GCOptions{}); err != nil || st.Deleted > 0 || st.Unnamed == 0 {
		t.Errorf("%+v %v", st, err)
	}
}
