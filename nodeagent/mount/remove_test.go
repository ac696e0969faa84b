package mount_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
)

func TestRemoveAll(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	outside := filepath.Join(dir, "outside")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(outside, []byte("kept"), 0o644))
	deep := filepath.Join(victim, strings.Repeat("d/", 300))
	must(os.MkdirAll(deep, 0o755))
	for i := range 3000 {
		must(os.WriteFile(filepath.Join(victim, "f"+strings.Repeat("x", i%50)+string(rune('a'+i%26))), nil, 0o000))
	}
	must(os.Symlink(outside, filepath.Join(victim, "link")))
	must(os.Symlink("/", filepath.Join(victim, "root")))
	must(os.Chmod(filepath.Join(victim, "d"), 0o500))
	must(mount.RemoveAll(victim))
	if _, err := os.Lstat(victim); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
	if data, _ := os.ReadFile(outside); string(data) != "kept" {
		t.Error("followed a link")
	}
	must(mount.RemoveAll(victim))                          // not there
	must(mount.RemoveAll(filepath.Join(victim, "x", "y"))) // nor its parents
	must(os.WriteFile(victim, nil, 0o644))
	must(mount.RemoveAll(victim)) // a file
}

// A container can make more levels than this process may have files open.
func TestRemoveAllOfManyLevels(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.Mkdir(victim, 0o755); err != nil {
		t.Fatal(err)
	}
	const levels = 5000
	fd, err := unix.Open(victim, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range levels {
		if err == nil {
			err = unix.Mkdirat(fd, "d", 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		up := fd
		fd, err = unix.Openat(up, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(up)
	}
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 256, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	err = mount.RemoveAll(victim)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(victim); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}

func TestRemoveAllSparesMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("mounting needs root")
		}
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	at := filepath.Join(dir, "volume", "s3", "bucket")
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	}()
	precious := filepath.Join(at, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(dir, "volume"), at} {
		if err := mount.RemoveAll(path); !errors.Is(err, mount.ErrBusy) {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := os.Stat(precious); err != nil {
			t.Fatalf("deleted through a mount: %v", err)
		}
	}
}
