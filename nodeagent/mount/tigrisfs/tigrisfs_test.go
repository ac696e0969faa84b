package tigrisfs

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
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

func TestArgs(t *testing.T) {
	for _, ok := range []string{"", "--memory-limit 1000 --no-checksum", "--memory-limit=500 '--acl' \"private\"", "--enable-perms=false"} {
		if err := CheckArgs(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{
		"x", "--cache /etc", "-o suid", "--ignore-fsync", "--uid 0", "--setuid=0", "--pprof :80", "--shared-config /x",
		"--iam", "--memory-limit", "-", "--", "--cluster", "--log-level fatal", "--endpoint http://x", "'",
	} {
		if err := CheckArgs(bad); !errors.Is(err, mount.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	args, env, err := driver{}.Command(mount.Spec{
		Endpoint: "https://fly.storage.tigris.dev", Bucket: "b", Prefix: "p/q", Region: "auto", Point: "/m",
		AccessKeyID: "id", SecretAccessKey: "secret", UID: 7, Args: "--memory-limit 9",
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(args, " ")
	for _, want := range []string{"--region=auto", "--enable-perms", "--enable-specials", "-o allow_other", "--uid=7", "--memory-limit=9 b:p/q /m"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %q", want, line)
		}
	}
	if strings.Contains(line, "secret") || len(env) != 2 {
		t.Errorf("arguments %q, environment %q", line, env)
	}
}
