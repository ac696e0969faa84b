package checkpoint

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needRoot skips where owners and attributes cannot be set.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root: sets owners and attributes")
}

var owner1 = Owner{SessionID: "s", SessionUID: "u1", Node: "n1", Instance: "i1", Generation: 1}

// rig is a tree, a store and a writer.
type rig struct {
	t     testing.TB
	store objstore.Store
	repo  *Repository
	s     *Session
	w     *Writer
	o     WriterOptions
	out   int
}

func newRig(t testing.TB, store objstore.Store, key []byte) *rig {
	t.Helper()
	needRoot(t)
	repo, err := Open(store, "root", key)
	must(t, err)
	r := &rig{t: t, store: store, repo: repo, s: repo.Session("s")}
	base := t.TempDir()
	r.o = WriterOptions{Dir: filepath.Join(base, "tree"), StateDir: filepath.Join(base, "state"), Owner: owner1}
	must(t, os.Mkdir(r.o.Dir, 0o755))
	_, _, err = r.s.Acquire(t.Context(), owner1)
	must(t, err)
	r.open()
	return r
}

func (r *rig) open() {
	r.t.Helper()
	w, err := r.s.NewWriter(r.t.Context(), r.o)
	must(r.t, err)
	r.w = w
}

// reopen is a restart of the process, by which it may lose its cache.
func (r *rig) reopen(cache bool) {
	r.t.Helper()
	must(r.t, r.w.Close())
	if !cache {
		must(r.t, os.RemoveAll(r.o.StateDir))
	}
	r.open()
}

func noFreeze(context.Context) (func() error, error) { return func() error { return nil }, nil }

func (r *rig) save() Info {
	r.t.Helper()
	info, err := r.w.Save(r.t.Context(), noFreeze, Meta{Trigger: "test"})
	must(r.t, err)
	return info
}

func (r *rig) path(p string) string { return filepath.Join(r.o.Dir, p) }

func (r *rig) put(p, text string) {
	r.t.Helper()
	must(r.t, os.MkdirAll(filepath.Dir(r.path(p)), 0o755))
	must(r.t, os.WriteFile(r.path(p), []byte(text), 0o644))
}

// restored restores a checkpoint and describes it.
func (r *rig) restored(id string) string {
	r.t.Helper()
	r.out++
	dir := filepath.Join(r.t.TempDir(), fmt.Sprint(r.out))
	_, err := r.s.Restore(r.t.Context(), id, RestoreOptions{Dir: dir, IDBase: r.o.IDBase})
	must(r.t, err)
	return describe(r.t, dir)
}

// check restores the newest checkpoint and compares it with the tree.
func (r *rig) check() {
	r.t.Helper()
	same(r.t, r.restored(""), describe(r.t, r.o.Dir))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func same(t testing.TB, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	var diff []string
	for _, l := range w {
		if !slices.Contains(g, l) {
			diff = append(diff, "- "+l)
		}
	}
	for _, l := range g {
		if !slices.Contains(w, l) {
			diff = append(diff, "+ "+l)
		}
	}
	t.Fatalf("restored tree differs (- as it was, + as restored):\n%s", strings.Join(diff[:min(len(diff), 20)], "\n"))
}

// describe tells all that a checkpoint must keep of a tree, one line for each name.
func describe(t testing.TB, dir string) string {
	t.Helper()
	var lines []string
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		l := fmt.Sprintf("%q %o %d:%d %d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Nano())
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFSOCK, syscall.S_IFCHR, syscall.S_IFBLK:
			return nil
		case syscall.S_IFLNK:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			l += fmt.Sprintf(" -> %q", to)
		case syscall.S_IFREG:
			text, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			l += fmt.Sprintf(" %d %x", len(text), sha256.Sum256(text))
			if st.Nlink > 1 {
				if first[st.Ino] == "" {
					first[st.Ino] = rel
				}
				l += fmt.Sprintf(" is %q", first[st.Ino])
			}
			fallthrough
		case syscall.S_IFDIR:
			buf := make([]byte, 4096)
			n, err := unix.Llistxattr(p, buf)
			if err != nil {
				return err
			}
			names := strings.FieldsFunc(string(buf[:n]), func(c rune) bool { return c == 0 })
			slices.Sort(names)
			for _, name := range names {
				v := make([]byte, 65536)
				n, err := unix.Lgetxattr(p, name, v)
				if err != nil {
					return err
				}
				l += fmt.Sprintf(" %s=%x", name, v[:n])
			}
		}
		lines = append(lines, l)
		return nil
	})
	must(t, err)
	return strings.Join(lines, "\n")
}
