// Package s3test runs a real S3 server (versitygw) for tests, and a proxy in front
// of it that is slow or broken on demand.
//
// The server is looked for in CLOUDCODE_TOOLS_DIR, in libexec/cloudcode, where
// `scripts/install-deps.sh test` puts it, and in PATH. Without it tests skip, or fail
// if CLOUDCODE_REQUIRE_REAL=1.
package s3test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

const (
	binary    = "versitygw"
	startTime = 30 * time.Second
)

// Keys of the server.
const (
	AccessKeyID     = "AKIDS3TEST"
	SecretAccessKey = "s3test-secret-access-key"
	Region          = "us-east-1"
)

// Options of Start; the zero value is fine.
type Options struct {
	// Dir holds the buckets as folders, objects as files. Empty: a folder that is removed.
	Dir string
	// AccessLog makes Requests work.
	AccessLog bool
	// Region; empty: the constant.
	Region string
}

// Server is a running S3 server. Its methods fail the test that it was started by.
type Server struct {
	t    testing.TB
	opts Options
	bin  string
	port int
	log  string

	mu  sync.Mutex
	cmd *exec.Cmd
	out *lockedBuffer
	// exited is closed when cmd is gone.
	exited chan struct{}
}

// Start runs a server until the test ends. It skips the test where there is none.
func Start(t testing.TB, opts Options) *Server {
	t.Helper()
	bin := Find(t)
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	if opts.Region == "" {
		opts.Region = Region
	}
	s := &Server{t: t, opts: opts, bin: bin}
	if opts.AccessLog {
		s.log = filepath.Join(t.TempDir(), "access.log")
	}
	t.Cleanup(s.Kill)
	// The server cannot say which port it took, so it is given one; somebody else may be faster.
	for attempt := 1; ; attempt++ {
		s.port = freePort(t)
		err := s.start()
		if err == nil {
			return s
		}
		if attempt == 5 {
			t.Fatal(err)
		}
	}
}

// Find returns the path of the server's program, or skips the test.
func Find(t testing.TB) string {
	t.Helper()
	return FindTool(t, binary)
}

// FindTool looks for a program of tests in CLOUDCODE_TOOLS_DIR, libexec/cloudcode
// (or CLOUDCODE_LIBEXEC_DIR) and PATH. Without it the test skips, or fails if CLOUDCODE_REQUIRE_REAL=1.
func FindTool(t testing.TB, name string) string {
	t.Helper()
	path, ok := LookTool(name)
	if ok {
		return path
	}
	const hint = "%s is not installed: scripts/install-deps.sh test"
	if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
		t.Fatalf(hint, name)
	}
	t.Skipf(hint, name)
	return ""
}

// LookTool is FindTool for tests that can do without.
func LookTool(name string) (path string, ok bool) {
	for _, dir := range []string{os.Getenv("CLOUDCODE_TOOLS_DIR"), os.Getenv("CLOUDCODE_LIBEXEC_DIR"), libexec()} {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); dir != "" && err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, true
		}
	}
	path, err := exec.LookPath(name)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	return path, err == nil
}

// libexec of the module that the test is in.
func libexec() string {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, "libexec", "cloudcode")
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	return ""
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Addr is host and port of the server.
func (s *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// Endpoint is the server's URL.
func (s *Server) Endpoint() string { return "http://" + s.Addr() }

// Dir is the folder with the buckets.
func (s *Server) Dir() string { return s.opts.Dir }

// Output is what the server printed since it was started last.
func (s *Server) Output() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out == nil {
		return ""
	}
	return s.out.String()
}

// PID of the server's process, 0 if it does not run.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// start runs the program and waits until it answers.
func (s *Server) start() error {
	args := []string{"--port", s.Addr(), "--region", s.opts.Region, "--keep-alive"}
	if s.log != "" {
		args = append(args, "--access-log", s.log)
	} else {
		args = append(args, "--quiet")
	}
	cmd := exec.Command(s.bin, append(args, "posix", s.opts.Dir)...)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+AccessKeyID, "ROOT_SECRET_KEY="+SecretAccessKey)
	cmd.Dir = s.opts.Dir
	out := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // how it ended is nobody's concern
	}()
	s.mu.Lock()
	s.cmd, s.out, s.exited = cmd, out, exited
	s.mu.Unlock()
	if err := s.answers(exited); err != nil {
		s.Kill()
		return fmt.Errorf("%s: %w\n%s", s.bin, err, out)
	}
	return nil
}

func (s *Server) answers(exited <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		client, close := s.client()
		_, err := client.ListBuckets(ctx)
		close()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-exited:
			return errors.New("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w", err)
		}
	}
}

func (s *Server) client() (client *minio.Client, close func()) {
	tr, err := minio.DefaultTransport(false)
	if err != nil {
		s.t.Fatal(err)
	}
	client, err = minio.New(s.Addr(), &minio.Options{
		Creds:      credentials.NewStaticV4(AccessKeyID, SecretAccessKey, ""),
		Region:     s.opts.Region,
		Transport:  tr,
		MaxRetries: 1,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return client, tr.CloseIdleConnections
}

// Start runs the server again after Stop or Kill, on the same address and data.
func (s *Server) Start() {
	s.t.Helper()
	if s.PID() != 0 {
		s.t.Fatal("the S3 server runs already")
	}
	if err := s.start(); err != nil {
		s.t.Fatal(err)
	}
}

// Stop ends the server politely, if it runs.
func (s *Server) Stop() { s.end(syscall.SIGTERM) }

// Kill ends the server at once, if it runs.
func (s *Server) Kill() { s.end(syscall.SIGKILL) }

// Pause freezes the server: it takes connections and does not answer. Resume thaws it.
func (s *Server) Pause() {
	s.t.Helper()
	s.signal(syscall.SIGSTOP)
	// The signal arrives a while later, thread by thread.
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !stopped(s.PID()); <-tick.C {
		if time.Now().After(deadline) {
			s.t.Fatal("the S3 server does not stop")
		}
	}
}

// stopped says whether all threads of a process are.
func stopped(pid int) bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(stats) == 0 {
		return false
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		_, state, ok := bytes.Cut(stat, []byte(") ")) // behind the name
		if err != nil || !ok || state[0] != 'T' {
			return false
		}
	}
	return true
}

// Resume ends Pause.
func (s *Server) Resume() { s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(sig) // gone already is fine
	}
}

func (s *Server) end(sig syscall.Signal) {
	s.mu.Lock()
	cmd, exited := s.cmd, s.exited
	s.cmd = nil
	s.mu.Unlock()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Signal(sig)
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	select {
	case <-exited:
	case <-timer.C:
		_ = cmd.Process.Kill()
		<-exited
	}
}

// Bucket makes a bucket, unless it is there, and returns how to reach it.
func (s *Server) Bucket(name string) storage.Config {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	client, close := s.client()
	defer close()
	err := client.MakeBucket(ctx, name, minio.MakeBucketOptions{Region: s.opts.Region})
	var r minio.ErrorResponse
	if err != nil && (!errors.As(err, &r) || r.Code != minio.BucketAlreadyOwnedByYou) {
		s.t.Fatal(err)
	}
	return storage.Config{
		Endpoint: s.Endpoint(), Bucket: name, AccessKeyID: AccessKeyID, SecretAccessKey: SecretAccessKey,
		Region: s.opts.Region, PathStyle: true,
	}
}

// Requests counts requests by operation, such as PutObject, since the server was
// first started. Options.AccessLog must be set.
func (s *Server) Requests() map[string]int {
	s.t.Helper()
	if s.log == "" {
		s.t.Fatal("s3test: Requests without Options.AccessLog")
	}
	data, err := os.ReadFile(s.log)
	if err != nil {
		s.t.Fatal(err)
	}
	counts := map[string]int{}
	for line := range bytes.Lines(data) {
		for _, field := range strings.Fields(string(line)) {
			if op, ok := strings.CutPrefix(field, "s3_"); ok {
				counts[op]++
				break
			}
		}
	}
	return counts
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf []byte
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	const enough = 1 << 20
	if len(b.buf) > enough {
		b.buf = slices.Clone(b.buf[len(b.buf)-enough/2:])
	}
	return len(p), nil
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.buf)
}
