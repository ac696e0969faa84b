// Package mounttest is what every Mounter must pass, against a real S3 server.
package mounttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

// Suite says what is tested.
type Suite struct {
	// New returns a Mounter on a state folder, as a daemon does at its start. It is
	// closed when the test ends, or before by the second result.
	New func(t testing.TB, dir string) (m mount.Mounter, close func())
	// Perms: modes of files are kept while mounted.
	Perms bool
	// OpenFiles: Sync writes what is in files that are open.
	OpenFiles bool
	// KeptUnwritten says, for a Remounter that keeps unwritten files on disk, whether
	// one is there in a mount's state folder; nil if there is none.
	KeptUnwritten func(dir, name string) error
	// Recovers is how long it may take to upload again after an outage.
	Recovers time.Duration
}

// NeedRoot skips without root and FUSE; CLOUDCODE_REQUIRE_REAL=1 makes that a failure.
func NeedRoot(t testing.TB) {
	t.Helper()
	_, err := os.Stat("/dev/fuse")
	if os.Geteuid() == 0 && err == nil {
		return
	}
	if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
		t.Fatal("mounting needs root and /dev/fuse")
	}
	t.Skip("mounting needs root and /dev/fuse")
}

// Run runs the suite.
func Run(t *testing.T, s Suite) {
	NeedRoot(t)
	s3 := s3test.Start(t, s3test.Options{})
	for name, test := range map[string]func(*env){
		"files":               testFiles,
		"open file":           testOpenFile,
		"many files":          testManyFiles,
		"unmount waits":       testUnmountWaits,
		"a repository":        testRepository,
		"adoption":            testAdoption,
		"another spec":        testAnotherSpec,
		"hung mounter":        testHung,
		"abandon":             testAbandon,
		"busy":                testBusy,
		"secrets":             testSecrets,
		"refusals":            testRefusals,
		"what is not mounted": testNotMounted,
		"attached":            testAttached,
	} {
		t.Run(name, func(t *testing.T) { test(newEnv(t, s, s3)) })
	}
	t.Run("killed mounter", func(t *testing.T) { testKilled(newEnv(t, s, s3test.Start(t, s3test.Options{}))) })
	t.Run("object store away", func(t *testing.T) { testStoreAway(newEnv(t, s, s3test.Start(t, s3test.Options{}))) })
	t.Run("object store hangs", func(t *testing.T) { testStoreHangs(newEnv(t, s, s3test.Start(t, s3test.Options{}))) })
}

// env is one session's mount.
type env struct {
	*testing.T
	suite  Suite
	s3     *s3test.Server
	cfg    storage.Config
	dir    string // state
	spec   mount.Spec
	m      mount.Mounter
	close  func()
	ctx    context.Context
	bucket string // the folder where the server keeps the prefix
}

const (
	testUID = 0x10000000
	testGID = 0x10000000
)

func newEnv(t *testing.T, s Suite, s3 *s3test.Server) *env {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	fds := descriptors(t)
	e := &env{T: t, suite: s, s3: s3, ctx: ctx, dir: filepath.Join(t.TempDir(), "state")}
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(filepath.Base(t.Name())))
	e.cfg = s3.Bucket(name)
	e.bucket = filepath.Join(s3.Dir(), name, "root/session-1")
	e.spec = mount.Spec{
		ID: "session-1", Point: filepath.Join(t.TempDir(), "mnt"), LogPath: filepath.Join(t.TempDir(), "log", "mounter.log"),
		Endpoint: e.cfg.Endpoint, Bucket: name, Prefix: "root/session-1", Region: e.cfg.Region, PathStyle: true,
		AccessKeyID: e.cfg.AccessKeyID, SecretAccessKey: e.cfg.SecretAccessKey, UID: testUID, GID: testGID,
	}
	e.m, e.close = s.New(t, e.dir)
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(e.spec.LogPath) // if there is one
			t.Logf("the mounter's log:\n%s", tail(log, 6000))
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := e.m.Abandon(ctx, e.spec.ID); err != nil {
			t.Errorf("Abandon at the end: %v", err)
		}
		e.close()
		if left, _ := os.ReadDir(e.dir); len(left) != 0 {
			t.Errorf("left in the state folder: %v", left)
		}
		e.eventually("all mounts and processes are gone", func() error {
			if left := append(points(t), e.processes()...); len(left) > 0 {
				return fmt.Errorf("left: %q", left)
			}
			return nil
		})
		e.eventually("all descriptors are closed", func() error {
			if now := descriptors(t); len(now) > len(fds) {
				return fmt.Errorf("open files before: %q, now: %q", fds, now)
			}
			return nil
		})
	})
	return e
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// points are the mounts below the test's folders.
func points(t testing.TB) []string {
	all, err := mountinfo.All()
	if err != nil {
		t.Fatal(err)
	}
	var p []string
	for _, m := range all {
		if strings.HasPrefix(m.Point, filepath.Dir(t.TempDir())) {
			p = append(p, m.Point)
		}
	}
	return p
}

// processes are those that have the mount point among their arguments.
func (e *env) processes() []string {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	e.must(err)
	var left []string
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err == nil && bytes.Contains(line, []byte(e.spec.Point)) {
			left = append(left, string(bytes.ReplaceAll(line, []byte{0}, []byte(" "))))
		}
	}
	return left
}

// descriptors are files and pidfds that we have open; sockets of idle connections
// to the S3 server come and go.
func descriptors(t testing.TB) []string {
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, name := range names {
		to, err := os.Readlink(name)
		if err != nil || strings.HasPrefix(to, "socket:") {
			continue
		}
		open = append(open, to)
	}
	return open
}

// eventually waits, bounded, until check returns nil.
func (e *env) eventually(what string, check func() error) {
	e.Helper()
	e.within(20*time.Second, what, check)
}

func (e *env) within(d time.Duration, what string, check func() error) {
	e.Helper()
	deadline := time.After(d)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			e.Fatalf("%s: not within %v: %v", what, d, err)
		}
	}
}

func (e *env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// took says how long things take.
func (e *env) took(what string, fn func() error) {
	e.Helper()
	start := time.Now()
	e.must(fn())
	e.Logf("%s: %v", what, time.Since(start).Round(time.Millisecond))
}

func (e *env) mount() {
	e.Helper()
	e.must(e.m.Mount(e.ctx, e.spec))
}

// restart is what a restart of the node daemon is for the mounts.
func (e *env) restart() {
	e.Helper()
	e.close()
	e.m, e.close = e.suite.New(e.T, e.dir)
}

func (e *env) path(name string) string { return filepath.Join(e.spec.Point, name) }

func (e *env) write(name, content string) {
	e.Helper()
	e.must(os.MkdirAll(filepath.Dir(e.path(name)), 0o755))
	e.must(os.WriteFile(e.path(name), []byte(content), 0o644))
}

func (e *env) read(name string) string {
	e.Helper()
	data, err := os.ReadFile(e.path(name))
	e.must(err)
	return string(data)
}

// objects of the prefix, by key below it. The server keeps them as files.
func (e *env) objects() map[string]string {
	e.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(e.bucket, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		rel, _ := filepath.Rel(e.bucket, path)
		all[rel] = string(data)
		return err
	})
	e.must(err)
	return all
}

func (e *env) wantObjects(want map[string]string) {
	e.Helper()
	got := e.objects()
	for name, content := range want {
		if c, ok := got[name]; !ok {
			e.Errorf("%s is not in the bucket", name)
		} else if c != content {
			e.Errorf("%s in the bucket has %d bytes that differ from the %d written", name, len(c), len(content))
		}
	}
	if e.Failed() {
		e.Fatalf("in the bucket: %d of %d", len(got), len(want))
	}
}

// pid of the mounter.
func (e *env) pid() int {
	e.Helper()
	all, err := e.m.List(e.ctx)
	e.must(err)
	for _, s := range all {
		if s.ID == e.spec.ID && s.PID != 0 {
			return s.PID
		}
	}
	e.Fatalf("no living mounter among %+v", all)
	return 0
}

func (e *env) kill(pid int, sig syscall.Signal) {
	e.Helper()
	e.must(syscall.Kill(pid, sig))
}

// alive says whether a process runs; a zombie does not.
func alive(pid int) bool {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := bytes.Cut(data, []byte(") "))
	return !bytes.HasPrefix(rest, []byte("Z"))
}

func (e *env) wantErr(err error, class error, words ...string) {
	e.Helper()
	if !errors.Is(err, class) {
		e.Fatalf("got error %v, want %v", err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			e.Fatalf("error %q does not say %q", err, w)
		}
	}
	for _, secret := range []string{e.spec.SecretAccessKey} {
		if strings.Contains(err.Error(), secret) {
			e.Fatalf("error tells a secret: %v", err)
		}
	}
}

// short is a bound in which something must not hang.
func (e *env) short(d time.Duration, fn func(ctx context.Context) error) error {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.ctx, d)
	defer cancel()
	start := time.Now()
	err := fn(ctx)
	if took := time.Since(start); took > d+2*time.Second {
		e.Fatalf("took %v, with a bound of %v", took, d)
	}
	return err
}

func keys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
