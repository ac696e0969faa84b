package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// deepFolders makes a chain of folders of one letter below dir.
func deepFolders(t *testing.T, dir string, n int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for range n {
		must(t, unix.Mkdirat(fd, "d", 0o755))
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, errors.Join(err, unix.Close(fd)))
		fd = next
	}
	must(t, unix.Close(fd))
}

// As deep as a container may go: what is saved can be restored, what is not is said,
// and few files are open at a time.
func TestDeepTreeWithFewFiles(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	deepFolders(t, r.o.Dir, 6000)
	long := strings.Repeat("x", 255)
	for i := range 300 {
		must(t, os.MkdirAll(filepath.Join(r.o.Dir, "many", fmt.Sprint(i), long), 0o755))
	}
	dir := filepath.Join(t.TempDir(), "out")
	must(t, os.Mkdir(dir+partial, 0o700)) // of a restore that was stopped
	deepFolders(t, dir+partial, 6000)

	open, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(open)) + 100, Max: was.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) }()

	info := r.save()
	// 2,048 levels and the tree itself, and the others.
	if want := int64(2049 + 1 + 600); info.Files != want {
		t.Errorf("%d entries, want %d", info.Files, want)
	}
	if len(info.Notes) != 1 || !strings.Contains(info.Notes[0], "longer than") {
		t.Errorf("notes: %q", info.Notes)
	}
	_, err = r.s.Restore(t.Context(), "", RestoreOptions{Dir: dir})
	must(t, err)
	o := r.o
	o.Dir, o.StateDir = dir, filepath.Join(t.TempDir(), "state")
	w, err := r.s.NewWriter(t.Context(), o)
	must(t, err)
	again, err := w.Save(t.Context(), nil, Meta{Trigger: "test"})
	if err != nil || !again.Unchanged {
		t.Errorf("what was restored is not what was saved: %+v, %v", again, err)
	}
	must(t, r.s.WriteTar(t.Context(), "", "", io.Discard))
}
