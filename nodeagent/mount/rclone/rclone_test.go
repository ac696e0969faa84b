package rclone

import (
	"errors"
	"os"
	"os/exec"
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
		KeepsUnwritten: true,
		Recovers:       2 * time.Minute,
	})
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
