package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mib = 1 << 20

func newManager(t *testing.T) *Manager {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("mounting needs root")
		}
		t.Skip("mounting needs root")
	}
	m := &Manager{Dir: filepath.Join(t.TempDir(), "volumes")}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := m.UnmountAll(ctx); err != nil {
			t.Error(err)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || bytes.Contains(mounts, []byte(m.Dir)) {
			t.Errorf("mounts left below %s: %v", m.Dir, err)
		}
		if l := loops(t, m.Dir); l != nil {
			t.Errorf("loop devices left: %v", l)
		}
	})
	return m
}

// loops returns the loop devices that hold a file below dir.
func loops(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(data), dir) {
			out = append(out, f)
		}
	}
	return out
}

func ensure(t *testing.T, m *Manager, session string, size int64) Volume {
	t.Helper()
	v, err := m.Ensure(t.Context(), session, size)
	if err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(v.S3Dir, &st); err != nil || st.Uid != v.IDBase || st.Gid != v.IDBase {
		t.Fatalf("workspace %s: owner %d:%d, want %d: %v", v.S3Dir, st.Uid, st.Gid, v.IDBase, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(v.S3Dir, &fs); err != nil || fs.Flags&unix.ST_NOSUID == 0 || fs.Flags&unix.ST_NODEV == 0 {
		t.Fatalf("workspace is not on a nosuid,nodev mount: flags %x, %v", fs.Flags, err)
	}
	if _, err := os.Stat(v.ScratchDir); err != nil {
		t.Fatal(err)
	}
	return v
}

func write(path string, n int) error {
	return os.WriteFile(path, make([]byte, n), 0o600)
}

func TestPlain(t *testing.T) {
	m := newManager(t)
	a := ensure(t, m, "a", 0)
	b := ensure(t, m, "b", 0)
	if a.IDBase == b.IDBase || a.IDBase < firstIDBase || b.IDBase%65536 != 0 {
		t.Errorf("id bases %x and %x", a.IDBase, b.IDBase)
	}
	if err := write(filepath.Join(a.S3Dir, "f"), 10); err != nil {
		t.Fatal(err)
	}
	// A restarted daemon, then a rebooted machine.
	for _, reboot := range []bool{false, true} {
		if reboot {
			if err := m.UnmountAll(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		again := &Manager{Dir: m.Dir}
		if got := ensure(t, again, "a", 0); got != a {
			t.Errorf("after a restart %+v, before %+v", got, a)
		}
		if _, err := os.Stat(filepath.Join(a.S3Dir, "f")); err != nil {
			t.Error(err)
		}
		if n := countMounts(t, m.Dir); n != 1 {
			t.Errorf("%s is mounted %d times", m.Dir, n)
		}
	}
	if fi, err := os.Stat(m.Dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode of %s: %v %v", m.Dir, fi.Mode(), err)
	}
}

func countMounts(t *testing.T, at string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), " "+at+" ")
}

func TestDisk(t *testing.T) {
	m := newManager(t)
	v := ensure(t, m, "a", 64*mib)
	if err := write(filepath.Join(v.S3Dir, "small"), mib); err != nil {
		t.Fatal(err)
	}
	// One limit for workspace and scratch.
	if err := write(filepath.Join(v.ScratchDir, "part"), 40*mib); err != nil {
		t.Fatal(err)
	}
	if err := write(filepath.Join(v.S3Dir, "big"), 40*mib); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("writing more than the limit: %v", err)
	}
	if err := os.Remove(filepath.Join(v.S3Dir, "big")); err != nil {
		t.Fatal(err)
	}
	if v = ensure(t, m, "a", 256*mib); v.DiskBytes != 256*mib {
		t.Errorf("grown to %d", v.DiskBytes)
	}
	if err := write(filepath.Join(v.S3Dir, "big"), 100*mib); err != nil {
		t.Fatalf("after growing: %v", err)
	}
	_, err := m.Ensure(t.Context(), "a", 128*mib)
	wantClass(t, err, ErrInvalid)

	// The size survives unmounting, as does the data.
	if err := m.Unmount(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(v.S3Dir); err == nil {
		t.Error("still mounted after Unmount")
	}
	if got := ensure(t, m, "a", 256*mib); got != v {
		t.Errorf("mounted again %+v, before %+v", got, v)
	}
	if fi, err := os.Stat(filepath.Join(v.S3Dir, "big")); err != nil || fi.Size() != 100*mib {
		t.Errorf("data after a remount: %v %v", fi, err)
	}
}

func TestRemove(t *testing.T) {
	m := newManager(t)
	a, b := ensure(t, m, "a", 64*mib), ensure(t, m, "b", 0)
	for _, s := range []string{"a", "b", "never-there"} {
		if err := m.Remove(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if entries, err := os.ReadDir(m.Dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v %v", entries, err)
	}
	if l := loops(t, m.Dir); l != nil {
		t.Errorf("loop devices left: %v", l)
	}
	if list, err := m.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("List = %v, %v", list, err)
	}
	// Now the ranges are free again.
	if c := ensure(t, m, "c", 0); c.IDBase != min(a.IDBase, b.IDBase) {
		t.Errorf("id base %x", c.IDBase)
	}
}

// A daemon that dies while deleting leaves files with the session's ids: the
// ids stay taken until they are gone.
func TestHalfRemovedKeepsIDs(t *testing.T) {
	m := newManager(t)
	a := ensure(t, m, "a", 0)
	if err := os.Rename(a.Dir, filepath.Join(m.Dir, removing+"a")); err != nil {
		t.Fatal(err)
	}
	if b := ensure(t, m, "b", 0); b.IDBase == a.IDBase {
		t.Errorf("id base %x was given again while files carry it", b.IDBase)
	}
	if err := m.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(m.Dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

// What cannot be deleted of one session is no trouble of another's, and keeps its ids.
func TestRemoveBesideALeftover(t *testing.T) {
	m := newManager(t)
	a, b := ensure(t, m, "a", 0), ensure(t, m, "b", 0)
	aside := filepath.Join(m.Dir, removing+"a")
	if err := os.Rename(a.Dir, aside); err != nil {
		t.Fatal(err)
	}
	held := filepath.Join(aside, "data", "s3")
	if err := unix.Mount("tmpfs", held, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	unmount := sync.OnceValue(func() error { return unix.Unmount(held, 0) })
	defer unmount()
	if err := m.Remove(t.Context(), "b"); err != nil {
		t.Errorf("b: %v", err)
	}
	if _, err := os.Lstat(b.Dir); !os.IsNotExist(err) {
		t.Error(err)
	}
	if err := m.Remove(t.Context(), "a"); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("a: %v", err)
	}
	if c := ensure(t, m, "c", 0); c.IDBase == a.IDBase {
		t.Errorf("id base %x was given again while files carry it", c.IDBase)
	}
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(m.Dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

func TestHalfMade(t *testing.T) {
	m := newManager(t)
	ensure(t, m, "first", 0) // so that Dir is mounted
	dir := filepath.Join(m.Dir, "a")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := write(filepath.Join(dir, diskFile+".new"), mib); err != nil {
		t.Fatal(err)
	}
	if list, err := m.List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("List = %v, %v", list, err)
	}
	ensure(t, m, "a", 64*mib)
}

// A daemon that dies between making the workspace and giving it to the session.
func TestWorkspaceWithoutOwner(t *testing.T) {
	m := newManager(t)
	v := ensure(t, m, "a", 0)
	if err := os.Lchown(v.S3Dir, 0, 0); err != nil {
		t.Fatal(err)
	}
	ensure(t, m, "a", 0) // checks the owner
	// What the user did to it stays.
	if err := os.Chmod(v.S3Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ensure(t, m, "a", 0)
	if fi, err := os.Stat(v.S3Dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

func TestUnclean(t *testing.T) {
	m := newManager(t)
	v := ensure(t, m, "a", 64*mib)
	if err := write(filepath.Join(v.S3Dir, "f"), mib); err != nil {
		t.Fatal(err)
	}
	if err := m.Unmount(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	// As a power cut leaves it: not clean.
	if out, err := exec.Command("debugfs", "-w", "-R", "set_super_value state 0", v.disk()).CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v: %s", err, out)
	}
	ensure(t, m, "a", 64*mib)
	if _, err := os.Stat(filepath.Join(v.S3Dir, "f")); err != nil {
		t.Error(err)
	}
}

func TestInvalid(t *testing.T) {
	m := newManager(t)
	for _, c := range []struct {
		session string
		size    int64
	}{{"../up", 0}, {"a", -1}, {"a", 1}, {"a", 1 << 62}} {
		_, err := m.Ensure(t.Context(), c.session, c.size)
		wantClass(t, err, ErrInvalid)
	}
	ensure(t, m, "plain", 0)
	_, err := m.Ensure(t.Context(), "plain", 64*mib)
	wantClass(t, err, ErrInvalid)
	if list, err := m.List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("List = %v, %v", list, err)
	}
}

// A container's mount namespace keeps the disk although it is unmounted here: a
// second loop device on one file would destroy what is in it.
func TestMountedElsewhere(t *testing.T) {
	m := newManager(t)
	v := ensure(t, m, "a", 64*mib)
	f, err := os.Create(filepath.Join(v.S3Dir, "open"))
	if err != nil {
		t.Fatal(err)
	}
	// What a container's namespace does: another mount of the same file system.
	other := t.TempDir()
	if err := unix.Mount(v.S3Dir, other, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(other, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Unmount(v.data(), 0); err != nil {
		t.Fatal(err)
	}
	ensure(t, m, "a", 64*mib)
	if l := loops(t, m.Dir); len(l) != 1 {
		t.Errorf("the disk is on %d loop devices", len(l))
	}
	if err := write(filepath.Join(other, "seen"), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(v.S3Dir, "seen")); err != nil {
		t.Errorf("two different file systems: %v", err)
	}
}

// A real full disk: a small file system that the volumes are on. It is a tmpfs
// because ext4 keeps blocks back, and gives them out again when it sees fit.
func TestNoSpace(t *testing.T) {
	newManager(t) // skips where there is no root
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	}()
	m := &Manager{Dir: filepath.Join(small, "volumes")}
	ensure(t, m, "a", 0)
	defer func() {
		if err := m.UnmountAll(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	if err := write(filepath.Join(small, "fill"), 8<<20); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling: %v", err)
	}
	for _, size := range []int64{0, 1 << 30} {
		_, err := m.Ensure(t.Context(), "b", size)
		wantClass(t, err, ErrNoSpace)
	}
	if list, err := m.List(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("List = %v, %v", list, err)
	}
}

func wantClass(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}
