package tigrisfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/fsop"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mounttest"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/process"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	program, ok := s3test.LookTool("tigrisfs")
	if !ok {
		t.Skip("tigrisfs is not in PATH: it is in no package registry, see docs/storage.md")
	}
	mounttest.Run(t, mounttest.Suite{
		New: func(t testing.TB, dir string) (mount.Mounter, func()) {
			m, err := New(process.Config{Dir: dir, Program: program, ProbeTimeout: mounttest.ProbeTimeout})
			if err != nil {
				t.Fatal(err)
			}
			return m, m.Close
		},
		Perms:     true,
		OpenFiles: true,
		Recovers:  40 * time.Second,
	})
}

func TestMissingProgram(t *testing.T) {
	m, err := New(process.Config{Dir: t.TempDir(), Program: "no-such-program"})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.Version(t.Context()); !errors.Is(err, mount.ErrUnavailable) {
		t.Errorf("Version: %v", err)
	}
	err = m.Mount(context.Background(), mount.Spec{
		ID: "s", Point: t.TempDir(), LogPath: t.TempDir() + "/log", Endpoint: "https://s3.example", Bucket: "bucket",
		AccessKeyID: "a", SecretAccessKey: "s",
	})
	if !errors.Is(err, mount.ErrUnavailable) {
		t.Errorf("Mount: %v", err)
	}
}

func TestArgsAreBounded(t *testing.T) {
	got, err := flags.Check("--memory-limit 1000000 --entry-limit=2000000000 --max-flushers 100000 --read-ahead-large 1000000000 --read-ahead-parallel 1 --memory-limit 800")
	want := []string{"--memory-limit=4000", "--entry-limit=1000000", "--max-flushers=64", "--read-ahead-large=409600", "--read-ahead-parallel=1024", "--memory-limit=800"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	for name := range flags.Bounds {
		if !slices.Contains(flags.Values, name) {
			t.Errorf("--%s is bounded and cannot be set", name)
		}
	}
}

// The session's processes make TigrisFS print as fast as they like, and nobody
// rotates its log: the kernel bounds it, and the mount works on.
func TestLogThatIsFull(t *testing.T) {
	mounttest.NeedRoot(t)
	program, ok := s3test.LookTool("tigrisfs")
	if !ok {
		t.Skip("tigrisfs is not in PATH: it is in no package registry, see docs/storage.md")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	m, err := process.New(smallLog{}, process.Config{Dir: filepath.Join(t.TempDir(), "state"), Program: program, LogBytes: 32 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	c := s3test.Start(t, s3test.Options{}).Bucket("bucket")
	s := mount.Spec{
		ID: "s", Point: filepath.Join(t.TempDir(), "mnt"), LogPath: filepath.Join(t.TempDir(), "log"),
		Endpoint: c.Endpoint, Bucket: c.Bucket, Region: c.Region, AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey,
		UID: 0x10000000, GID: 0x10000000,
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(m.Mount(ctx, s))
	defer func() {
		if err := m.Abandon(context.WithoutCancel(ctx), s.ID); err != nil {
			t.Error(err)
		}
	}()
	for i := range 100 {
		must(os.WriteFile(filepath.Join(s.Point, fmt.Sprintf("file-%d", i)), []byte("x"), 0o644))
	}
	for range 20 {
		must(fsop.Setxattr(ctx, s.Point, "debug", "."))
	}
	fi, err := os.Stat(s.LogPath)
	must(err)
	if fi.Size() < smallLogBytes/2 || fi.Size() > smallLogBytes {
		t.Errorf("the log has %d bytes", fi.Size())
	}
	must(m.Probe(ctx, s.ID)) // which rotates
	must(os.WriteFile(filepath.Join(s.Point, "after"), []byte("y"), 0o644))
	must(m.Unmount(ctx, s.ID))
}

// smallLog is full sooner.
type smallLog struct{ driver }

const smallLogBytes = 256 << 10

func (smallLog) MaxLogBytes() int64 { return smallLogBytes }

func TestArgs(t *testing.T) {
	for _, ok := range []string{"", "--memory-limit 1000 --no-checksum", "--memory-limit=500 '--acl' \"private\"", "--enable-perms=false"} {
		if err := CheckArgs(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{
		"x", "--cache /etc", "-o suid", "--ignore-fsync", "--uid 0", "--setuid=0", "--pprof :80", "--shared-config /x",
		"--iam", "--memory-limit", "-", "--", "--cluster", "--log-level fatal", "--endpoint http://x", "'",
		"--debug_s3", "--memory-limit lots",
	} {
		if err := CheckArgs(bad); !errors.Is(err, mount.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	args, env, err := driver{}.Command(mount.Spec{
		Endpoint: "https://fly.storage.tigris.dev", Bucket: "b", Prefix: "p/q", Region: "auto", Point: "/m",
		AccessKeyID: "id", SecretAccessKey: "secret", UID: 7, Args: "--memory-limit 90",
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(args, " ")
	for _, want := range []string{"--region=auto", "--enable-perms", "--enable-specials", "-o allow_other", "--uid=7", "--memory-limit=90 b:p/q /m"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %q", want, line)
		}
	}
	if strings.Contains(line, "secret") || len(env) != 2 {
		t.Errorf("arguments %q, environment %q", line, env)
	}
}
