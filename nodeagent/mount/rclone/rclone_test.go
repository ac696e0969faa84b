package rclone

import (
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

func TestCacheFolder(t *testing.T) {
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Skip("without fusermount there are no arguments")
	}
	for given, want := range map[string]string{"": "--cache-dir=/state/cache", "/disk/cache": "--cache-dir=/disk/cache"} {
		args, _, err := driver{}.Command(mount.Spec{Bucket: "b", Point: "/m", CacheDir: given}, "/state")
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
