package rmtree

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// deep makes a chain of folders below dir, with a file in every hundredth.
func deep(t *testing.T, dir string, n int) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(err)
	for i := range n {
		must(unix.Mkdirat(fd, "d", 0o755))
		if i%100 == 0 {
			f, err := unix.Openat(fd, "f", unix.O_CREAT|unix.O_CLOEXEC, 0)
			must(err)
			must(unix.Close(f))
		}
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(err)
		must(unix.Close(fd))
		fd = next
	}
	must(unix.Close(fd))
}

// fewFiles lets the process open only some more.
func fewFiles(t *testing.T, n uint64) {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(open)) + n, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	})
}

func TestManyLevelsWithFewFiles(t *testing.T) {
	for _, n := range []int{0, levels - 1, levels, levels + 1, 3 * levels, 6000} {
		dir := filepath.Join(t.TempDir(), "victim")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		deep(t, dir, n)
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			fewFiles(t, levels+20)
			if err := Remove(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(dir); !os.IsNotExist(err) {
				t.Errorf("still there: %v", err)
			}
		})
	}
}

// Many deep folders beside one another, and names that are those of moved ones.
func TestManyDeepFolders(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "victim")
	for i := range 200 {
		at := filepath.Join(dir, fmt.Sprintf(".removing-%d", i))
		if i >= 150 {
			at = filepath.Join(dir, "one", fmt.Sprint(i))
		}
		if err := os.MkdirAll(at, 0o700); err != nil {
			t.Fatal(err)
		}
		deep(t, at, levels+i%5)
	}
	fewFiles(t, levels+20)
	if err := Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}

func TestLinksAndMounts(t *testing.T) {
	base := t.TempDir()
	dir, kept := filepath.Join(base, "victim"), filepath.Join(base, "kept")
	for _, d := range []string{dir, kept} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(filepath.Join(kept, "f"), nil, 0o600), os.Symlink(kept, filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(Remove(dir), Remove(dir), Remove(filepath.Join(dir, "no", "such"))); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(kept, "f")); err != nil {
		t.Error("followed a link")
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("mounting needs root")
		}
		t.Skip("mounting needs root")
	}
	at := filepath.Join(dir, "mnt")
	if err := errors.Join(os.MkdirAll(at, 0o755), unix.Mount(kept, at, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	}()
	// On the same device: only that it is a mount holds.
	if err := Remove(dir); !errors.Is(err, ErrMounted) {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(kept, "f")); err != nil {
		t.Error("removed what is mounted")
	}
}
