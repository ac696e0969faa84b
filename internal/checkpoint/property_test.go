package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// mutator changes a tree at random. All goes through os.Root: the links it makes
// must not lead it out of the tree, for it runs as root. Each change works or is
// refused for a reason that is all right.
type mutator struct {
	rt   *rapid.T
	root *os.Root
}

var partNames = []string{"a", "b", "c", ".git", "a b", "ü", "\xff\xfe", "new\nline", "-", "~", "!", "a.", "%00", "A"}

func (m *mutator) path() string {
	n := rapid.IntRange(1, 3).Draw(m.rt, "depth")
	p := ""
	for range n {
		p = filepath.Join(p, rapid.SampledFrom(partNames).Draw(m.rt, "part"))
	}
	return p
}

func (m *mutator) text() []byte {
	n := rapid.SampledFrom([]int{0, 1, 100, 4096, 65536, 65537, 200_000, 1_200_000}).Draw(m.rt, "size")
	seed := rapid.Uint64().Draw(m.rt, "seed")
	b := make([]byte, n)
	for i := range b {
		if i%7 == 0 {
			seed = seed*6364136223846793005 + 1442695040888963407
		}
		b[i] = byte(seed >> (8 * (i % 7)))
	}
	if rapid.Bool().Draw(m.rt, "zeros") {
		clear(b[n/3 : 2*n/3])
	}
	return b
}

func (m *mutator) step() {
	p := m.path()
	m.root.MkdirAll(filepath.Dir(p), 0o755) // where a file is in the way, what follows is refused
	switch rapid.IntRange(0, 15).Draw(m.rt, "op") {
	case 0, 1, 2:
		if st, err := m.root.Lstat(p); err != nil || st.Mode().IsRegular() { // opening a FIFO would wait
			m.root.WriteFile(p, m.text(), 0o644)
		}
	case 3:
		m.file(p, os.O_APPEND, func(f *os.File) { f.Write(m.text()) })
	case 4: // in place, perhaps beyond the end
		m.file(p, 0, func(f *os.File) { f.WriteAt(m.text(), rapid.Int64Range(0, 3<<20).Draw(m.rt, "at")) })
	case 5:
		m.file(p, 0, func(f *os.File) { f.Truncate(rapid.Int64Range(0, 4<<20).Draw(m.rt, "len")) })
	case 6:
		m.root.RemoveAll(p)
	case 7:
		m.root.Rename(p, m.path())
	case 8:
		m.root.Symlink(rapid.SampledFrom([]string{"a", "../..", "/nowhere/at/all", "loop", "\xff"}).Draw(m.rt, "to"), p)
	case 9:
		m.root.Link(p, m.path())
	case 10:
		m.file(p, 0, func(f *os.File) {
			unix.Fchmod(int(f.Fd()), rapid.SampledFrom([]uint32{0o644, 0, 0o7777, 0o4755, 0o1777, 0o2755}).Draw(m.rt, "mode"))
		})
	case 11:
		m.root.Lchown(p, rapid.IntRange(0, 70_000).Draw(m.rt, "uid"), rapid.IntRange(0, 60_000).Draw(m.rt, "gid"))
	case 12:
		m.file(p, 0, func(f *os.File) {
			name := "user." + rapid.SampledFrom([]string{"x", "y=z"}).Draw(m.rt, "attr")
			unix.Fsetxattr(int(f.Fd()), name, []byte(rapid.StringN(0, 40, 40).Draw(m.rt, "value")), 0)
		})
	case 13:
		if d, err := m.root.OpenFile(filepath.Dir(p), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0); err == nil {
			unix.Mkfifoat(int(d.Fd()), filepath.Base(p), 0o600)
			d.Close()
		}
	case 14: // changes content and puts the old time back
		m.file(p, 0, func(f *os.File) {
			st, err := f.Stat()
			if err == nil {
				f.WriteAt([]byte{1}, 0)
				m.root.Chtimes(p, st.ModTime(), st.ModTime())
			}
		})
	case 15:
		m.root.Mkdir(p, 0o700)
	}
}

// file opens what is a plain file by that very name.
func (m *mutator) file(p string, flags int, f func(*os.File)) {
	if st, err := m.root.Lstat(p); err != nil || !st.Mode().IsRegular() {
		return
	}
	file, err := m.root.OpenFile(p, os.O_WRONLY|flags, 0)
	if err != nil {
		return
	}
	defer file.Close()
	f(file)
}

// Whatever happens to a tree between checkpoints, each of them gives it back as it
// was, also after restarts with and without the cache.
func TestAnyTreeComesBack(t *testing.T) {
	needRoot(t)
	rapid.Check(t, func(rt *rapid.T) {
		var key []byte
		if rapid.Bool().Draw(rt, "encrypted") {
			key = bytes.Repeat([]byte{7}, 32)
		}
		r := newRig(t, objstore.NewMemory(), key)
		defer os.RemoveAll(filepath.Dir(r.o.Dir))
		root, err := os.OpenRoot(r.o.Dir)
		must(t, err)
		defer root.Close()
		m := &mutator{rt, root}
		was := map[string]string{}
		for range rapid.IntRange(1, 5).Draw(rt, "saves") {
			for range rapid.IntRange(0, 12).Draw(rt, "steps") {
				m.step()
			}
			var info Info
			var err error
			if rapid.Bool().Draw(rt, "freeze") {
				info, err = r.w.Save(t.Context(), noFreeze, Meta{})
			} else {
				info, err = r.w.Save(t.Context(), nil, Meta{})
			}
			must(t, err)
			was[info.ID] = describe(t, r.o.Dir)
			if rapid.Bool().Draw(rt, "restart") {
				r.reopen(rapid.Bool().Draw(rt, "cache"))
			}
		}
		must(t, r.w.Close())
		for id, want := range was {
			same(t, r.restored(id), want)
			must(t, r.s.Check(t.Context(), id))
		}
	})
}

// A folder as deep as the file system allows, with paths longer than the kernel
// takes at once.
func TestVeryDeepTree(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	fd, err := unix.Open(r.o.Dir, unix.O_DIRECTORY, 0)
	must(t, err)
	name := string(bytes.Repeat([]byte{'d'}, 200))
	for range 20 {
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	f, err := unix.Openat(fd, "bottom", unix.O_CREAT|unix.O_WRONLY, 0o600)
	must(t, err)
	_, err = unix.Write(f, []byte("deep"))
	must(t, errors.Join(err, unix.Close(f), unix.Close(fd)))
	if info := r.save(); info.Files != 22 {
		t.Errorf("%d entries", info.Files)
	}
	dir := filepath.Join(t.TempDir(), "out")
	_, err = r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir})
	must(t, err)
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(root)
	long := bytes.Repeat([]byte(name+"/"), 20)
	fd, err = openBelow(root, string(long)+"bottom", unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(fd)
	b := make([]byte, 10)
	n, err := unix.Read(fd, b)
	must(t, err)
	if string(b[:n]) != "deep" {
		t.Errorf("%q", b[:n])
	}
}

// Deeper than what is saved: that is said, and all above comes back.
func TestEndlessTree(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("a", "b")
	fd, err := unix.Open(r.o.Dir, unix.O_DIRECTORY, 0)
	must(t, err)
	name := string(bytes.Repeat([]byte{'d'}, 250))
	for range 300 {
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))
	info := r.save()
	// 16 names of 250 bytes and what is between them are 4,015 bytes.
	if len(info.Notes) != 1 || len(info.Notes[0]) > maxNote+10 || !strings.Contains(info.Notes[0], "longer than 4096 bytes") || info.Files != 18 {
		t.Errorf("%d entries, notes %q", info.Files, info.Notes)
	}
	dir := filepath.Join(t.TempDir(), "out")
	if _, err := r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "a"))
	if err != nil || string(text) != "b" {
		t.Error(string(text), err)
	}
}

func TestHolesStayHoles(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	f, err := os.Create(r.path("sparse"))
	must(t, err)
	const size = 40 << 30
	must(t, f.Truncate(size))
	for _, at := range []int64{0, 5 << 30, size - 3} {
		_, err := f.WriteAt([]byte("abc"), at)
		must(t, err)
	}
	must(t, f.Close())
	start := time.Now()
	info := r.save()
	if info.Bytes > 1<<20 || time.Since(start) > 20*time.Second {
		t.Errorf("%d bytes in %v for three in 40 GiB", info.Bytes, time.Since(start))
	}
	dir := filepath.Join(t.TempDir(), "out")
	_, err = r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir})
	must(t, err)
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(dir, "sparse"), &st))
	if st.Size != size || st.Blocks*512 > 1<<20 {
		t.Errorf("restored with %d bytes on %d of disk", st.Size, st.Blocks*512)
	}
	f, err = os.Open(filepath.Join(dir, "sparse"))
	must(t, err)
	defer f.Close()
	b := make([]byte, 3)
	for _, at := range []int64{0, 5 << 30, size - 3} {
		_, err := f.ReadAt(b, at)
		must(t, err)
		if string(b) != "abc" {
			t.Errorf("%q at %d", b, at)
		}
	}
}

// Ids, access lists and capabilities are those inside the container, wherever its
// ids lie on the host.
func TestIDsMoveWithTheContainer(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.o.IDBase = 100_000
	r.reopen(true)
	r.put("f", "x")
	r.put("stranger", "x")
	must(t, os.Chown(r.path("f"), 100_005, 100_006))
	must(t, os.Chown(r.path("stranger"), 5, 5))
	acl := []byte{2, 0, 0, 0 /* user */, 1, 0, 6, 0, 255, 255, 255, 255 /* named user */, 2, 0, 4, 0, 0xa7, 0x86, 1, 0, /* 100007 */
		4, 0, 4, 0, 255, 255, 255, 255 /* mask */, 16, 0, 4, 0, 255, 255, 255, 255 /* other */, 32, 0, 4, 0, 255, 255, 255, 255}
	must(t, unix.Setxattr(r.path("f"), xattrAccess, acl, 0))
	capability := []byte{1, 0, 0, 3, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xa0, 0x86, 1, 0} // root id 100000
	must(t, unix.Setxattr(r.path("f"), xattrCaps, capability, 0))
	info := r.save()
	if !slices.ContainsFunc(info.Notes, func(n string) bool { return bytes.Contains([]byte(n), []byte("outside")) }) {
		t.Errorf("notes: %q", info.Notes)
	}
	for _, base := range []uint32{200_000, 0} {
		dir := filepath.Join(t.TempDir(), fmt.Sprint(base))
		_, err := r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir, IDBase: base})
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(dir, "f"), &st))
		if st.Uid != base+5 || st.Gid != base+6 {
			t.Errorf("base %d: owner %d:%d", base, st.Uid, st.Gid)
		}
		must(t, unix.Stat(filepath.Join(dir, "stranger"), &st))
		if st.Uid != base+nobody {
			t.Errorf("base %d: stranger is %d", base, st.Uid)
		}
		v := make([]byte, 100)
		n, err := unix.Getxattr(filepath.Join(dir, "f"), xattrAccess, v)
		must(t, err)
		if want := base + 7; n != len(acl) || v[16] != byte(want) || v[17] != byte(want>>8) || v[18] != byte(want>>16) {
			t.Errorf("base %d: access list %v", base, v[:n])
		}
		n, err = unix.Getxattr(filepath.Join(dir, "f"), xattrCaps, v)
		must(t, err)
		want := capability[:20:20]
		if want[3] = 2; base != 0 {
			want = append(want, byte(base), byte(base>>8), byte(base>>16), 0)
			want[3] = 3
		}
		if !bytes.Equal(v[:n], want) {
			t.Errorf("base %d: capability %v, want %v", base, v[:n], want)
		}
		want[3] = 3
	}
}
