package rclone

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mounttest"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	if _, err := exec.LookPath("rclone"); err != nil {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("rclone is not installed (Debian packages rclone, fuse3)")
		}
		t.Skip("rclone is not installed (Debian packages rclone, fuse3)")
	}
	mounttest.Run(t, mounttest.Suite{
		New: func(t testing.TB, dir string) (mount.Mounter, func()) {
			m, err := New(process.Config{Dir: dir, ProbeTimeout: mounttest.ProbeTimeout})
			if err != nil {
				t.Fatal(err)
			}
			return m, m.Close
		},
		KeptUnwritten: kept,
		Recovers:      2 * time.Minute,
	})
}

// kept: rclone writes its notes in place, several times around a close; a kill in
// the middle of that loses the file. So they must have been left alone for a while.
func kept(cache, name string) error {
	meta := filepath.Join(cache, "vfsMeta")
	left, err := dirty(meta)
	if err != nil {
		return err
	}
	if len(left) != 1 || filepath.Base(left[0]) != name {
		return fmt.Errorf("dirty are %q", left)
	}
	return filepath.WalkDir(meta, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err == nil && time.Since(fi.ModTime()) < 500*time.Millisecond {
			err = errors.New("it has just changed")
		}
		return err
	})
}

// What a session writes faster than it is uploaded fills its own disk and not the
// machine's, and the mount works on once there is room.
func TestCacheOnAFullDisk(t *testing.T) {
	mounttest.NeedRoot(t)
	if _, err := exec.LookPath("rclone"); err != nil {
		t.Skip("rclone is not installed (Debian packages rclone, fuse3)")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(t.TempDir(), "data")
	must(os.Mkdir(disk, 0o700))
	must(unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"))
	defer func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Errorf("the session's disk is held: %v", err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	state := filepath.Join(t.TempDir(), "state")
	m, err := New(process.Config{Dir: state})
	must(err)
	defer m.Close()
	c := s3test.Start(t, s3test.Options{}).Bucket("bucket")
	s := mount.Spec{
		ID: "s", Point: filepath.Join(t.TempDir(), "mnt"), LogPath: filepath.Join(t.TempDir(), "log"), CacheDir: filepath.Join(disk, "mountcache"),
		Endpoint: c.Endpoint, Bucket: c.Bucket, Region: c.Region, AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, PathStyle: true,
	}
	must(m.Mount(ctx, s))
	defer func() {
		if err := m.Abandon(context.WithoutCancel(ctx), s.ID); err != nil {
			t.Error(err)
		}
	}()
	name := filepath.Join(s.Point, "large")
	f, err := os.Create(name)
	must(err)
	written := 0
	for piece := make([]byte, 1<<20); err == nil && written < 64<<20; {
		var n int
		n, err = f.Write(piece)
		written += n
	}
	_ = f.Close()
	if err == nil || written > 17<<20 {
		t.Errorf("%d bytes fit into 16 MiB: %v", written, err)
	}
	t.Logf("after %d MiB: %v", written>>20, err)
	must(filepath.WalkDir(state, func(path string, e fs.DirEntry, err error) error {
		if fi, ierr := e.Info(); ierr == nil && fi.Size() > 1<<20 {
			t.Errorf("%s on the machine's disk has %d bytes", path, fi.Size())
		}
		return err
	}))
	must(os.Remove(name))
	must(os.WriteFile(filepath.Join(s.Point, "small"), []byte("x"), 0o644))
	must(m.Unmount(ctx, s.ID))
}

func TestCacheFolder(t *testing.T) {
	for given, want := range map[string]string{"": "--cache-dir=/state/cache", "/disk/cache": "--cache-dir=/disk/cache"} {
		args, _, err := driver{}.Command(mount.Spec{Bucket: "b", Point: "/m", CacheDir: given}, "/state")
		if errors.Is(err, mount.ErrUnavailable) {
			t.Skip(err)
		}
		if err != nil || !slices.Contains(args, want) {
			t.Errorf("%q: %q, %v", given, args, err)
		}
	}
}

func TestArgs(t *testing.T) {
	for _, ok := range []string{"", "--vfs-read-ahead 1M --no-modtime", "--transfers=8"} {
		if err := CheckArgs(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{"x", "--rc", "--cache-dir /etc", "--vfs-cache-mode off", "--config x", "--log-file x", "--password-command x", "-vv", "--daemon", "--memory-limit 1"} {
		if err := CheckArgs(bad); !errors.Is(err, mount.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
