package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// plain is a driver of a program that mounts nothing.
type plain struct{ args []string }

func (plain) Name() string                                                 { return "plain" }
func (plain) FSType() string                                               { return "fuse.plain" }
func (plain) VersionOf(context.Context, string) (string, error)            { return "1", nil }
func (d plain) Command(mount.Spec, string) (args, env []string, err error) { return d.args, nil, nil }
func (plain) Ready(context.Context, mount.Spec, Mounted) error             { return nil }
func (plain) Sync(context.Context, Mounted) error                          { return nil }
func (plain) Words(line string) string                                     { return line }

func newMounter(t *testing.T, args ...string) (*Mounter, mount.Spec) {
	t.Helper()
	m, err := New(plain{args}, Config{Dir: filepath.Join(t.TempDir(), "state"), Program: "sh", MountTimeout: 5 * time.Second, LogBytes: 1000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m, mount.Spec{
		ID: "s", Point: filepath.Join(t.TempDir(), "mnt"), LogPath: filepath.Join(t.TempDir(), "log"),
		Endpoint: "http://127.0.0.1:1", Bucket: "bucket", AccessKeyID: "AKID", SecretAccessKey: "SECRET",
	}
}

// start is Mount without the look at the object store.
func start(m *Mounter, s mount.Spec) error {
	program, err := m.program()
	if err != nil {
		return err
	}
	return m.start(context.Background(), program, s)
}

func TestProgramThatFails(t *testing.T) {
	m, s := newMounter(t, "-c", "echo it does not like SECRET, AKID >&2; exit 3")
	err := start(m, s)
	if !errors.Is(err, mount.ErrFailed) || !strings.Contains(err.Error(), "it does not like ***, ***") {
		t.Fatalf("got %v", err)
	}
	m, s = newMounter(t, "-c", "echo waiting; exec sleep 1000")
	m.cfg.MountTimeout = 300 * time.Millisecond
	err = start(m, s)
	if !errors.Is(err, mount.ErrFailed) || !strings.Contains(err.Error(), "waiting") {
		t.Fatalf("got %v", err)
	}
	if st, err := m.load("s"); err != nil {
		t.Fatal(err)
	} else if _, err := st.open(); !errors.Is(err, errGone) {
		t.Fatalf("a program that did not mount in time still runs: %v", err)
	}
}

// Only the process that was started is ever taken for the mounter, and killed.
func TestProcessIsTheSame(t *testing.T) {
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := other.Process.Kill(); err != nil {
			t.Errorf("a process that is not ours was killed: %v", err)
		}
		_ = other.Wait()
	}()
	begun, err := startTime(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	m, s := newMounter(t)
	for _, change := range []func(*state){
		func(st *state) { st.Start-- },
		func(st *state) { st.Boot = "another boot" },
		func(st *state) { st.PID = 1 },
	} {
		st, err := newState(s)
		if err != nil {
			t.Fatal(err)
		}
		st.PID, st.Start = other.Process.Pid, begun
		if p, err := st.open(); err != nil {
			t.Fatal(err)
		} else {
			p.close()
		}
		change(&st)
		if err := os.MkdirAll(m.folder("s"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := m.save(&st); err != nil {
			t.Fatal(err)
		}
		if err := m.Probe(t.Context(), "s"); !errors.Is(err, mount.ErrDead) {
			t.Errorf("Probe: %v", err)
		}
		if err := m.Abandon(t.Context(), "s"); err != nil {
			t.Errorf("Abandon: %v", err)
		}
	}
	if _, err := openProc(other.Process.Pid, begun); err != nil {
		t.Errorf("the other process: %v", err)
	}
}

// A daemon that dies before it has written down what it starts leaves nothing.
func TestGate(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ran := filepath.Join(t.TempDir(), "ran")
	cmd := exec.Command("/bin/sh", "-c", gate, "name", "touch", ran)
	cmd.ExtraFiles = []*os.File{r}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := cmd.Wait(); err == nil {
		t.Error("the gate succeeded")
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("the program ran")
	}
}

func TestWait(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	begun, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := openProc(cmd.Process.Pid, begun)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	if err := p.kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.wait(t.Context()); err != nil { // a zombie: nobody has waited for it yet
		t.Errorf("wait: %v", err)
	}
	if _, err := openProc(cmd.Process.Pid, begun); !errors.Is(err, errGone) {
		t.Errorf("a zombie counts as running: %v", err)
	}
	_ = cmd.Wait()
	if err := p.kill(); err != nil {
		t.Errorf("killing what is gone: %v", err)
	}
}

func TestSplit(t *testing.T) {
	for line, want := range map[string][]string{
		"":                        nil,
		"  a  b\t":                {"a", "b"},
		`'a b' "c d" e\ f`:        {"a b", "c d", "e f"},
		`"a\"b" 'c\d' "e\f" ''`:   {`a"b`, `c\d`, `e\f`, ""},
		`--x="1 2" --y='3'4"5"`:   {"--x=1 2", "--y=345"},
		"$HOME `id` * ; rm -rf /": {"$HOME", "`id`", "*", ";", "rm", "-rf", "/"},
	} {
		got, err := Split(line)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v; want %q", line, got, err, want)
		}
	}
	for _, line := range []string{`'a`, `"a`, `a\`} {
		if got, err := Split(line); err == nil {
			t.Errorf("%q: %q", line, got)
		}
	}
}

func TestFlags(t *testing.T) {
	f := Flags{Switches: []string{"on"}, Values: []string{"n"}}
	got, err := f.Check(`-on --n 5 -n=6 --on=false --n -on`)
	if want := []string{"--on", "--n=5", "--n=6", "--on=false", "--n=-on"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	for _, line := range []string{"x", "--x", "--n", "--on=/etc", "--on x", "--", "-", "---n 5"} {
		if got, err := f.Check(line); err == nil {
			t.Errorf("%q: %q", line, got)
		}
	}
}

func TestFlagsAreBounded(t *testing.T) {
	f := Flags{Values: []string{"n", "m"}, Bounds: map[string]Bound{"n": {Min: 2, Max: 100}}}
	got, err := f.Check("--n 5 --n=101 --n 99999999999999999999 --n=-1 --n 0 --m 1000")
	if want := []string{"--n=5", "--n=100", "--n=100", "--n=2", "--n=2", "--m=1000"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	for _, line := range []string{"--n x", "--n=", "--n 1e9", "--n 0x7fffffff", "--n '5 '"} {
		if got, err := f.Check(line); err == nil {
			t.Errorf("%q: %q", line, got)
		}
	}
}

// bounded is plain with a log that the kernel bounds.
type bounded struct{ plain }

func (bounded) MaxLogBytes() int64 { return 64 << 10 }

// Nobody rotates while the program prints as fast as it can.
func TestKernelBoundsLog(t *testing.T) {
	_, s := newMounter(t)
	for name, d := range map[string]Driver{"bounded": bounded{plain{[]string{"-c", "yes | head -c 1000000"}}}, "not": plain{[]string{"-c", "yes | head -c 1000000"}}} {
		m, err := New(d, Config{Dir: filepath.Join(t.TempDir(), "state"), Program: "sh"})
		if err != nil {
			t.Fatal(err)
		}
		s.LogPath = filepath.Join(t.TempDir(), "log")
		if err := start(m, s); !errors.Is(err, mount.ErrFailed) {
			t.Errorf("%s: %v", name, err)
		}
		m.Close()
		if n := size(s.LogPath); name == "bounded" && (n == 0 || n > 64<<10) || name == "not" && n != 1000000 {
			t.Errorf("%s: the log has %d bytes", name, n)
		}
	}
}

// What a cache holds must not be uploaded by another mount than the one that is
// made anew from it, also where nothing else is known of it any more.
func TestCacheGoesWithTheMount(t *testing.T) {
	m, s := newMounter(t, "-c", "exit 1")
	s.CacheDir = filepath.Join(t.TempDir(), "cache")
	left := filepath.Join(s.CacheDir, "vfs", "file")
	fill := func() {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(left), 0o700), os.WriteFile(left, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	gone := func(when string) {
		t.Helper()
		if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", when, err)
		}
	}
	fill()
	if err := m.Mount(t.Context(), s); !errors.Is(err, mount.ErrFailed) {
		t.Errorf("Mount: %v", err)
	}
	gone("another mount")
	st, err := newState(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(m.folder("s"), 0o700), m.save(&st)); err != nil {
		t.Fatal(err)
	}
	fill()
	if err := m.Abandon(t.Context(), "s"); err != nil {
		t.Errorf("Abandon: %v", err)
	}
	gone("abandoned")
}

func TestLogIsBounded(t *testing.T) {
	m, s := newMounter(t)
	f, err := os.OpenFile(s.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 100 {
		if _, err := f.WriteString(strings.Repeat("x", 99) + "\n"); err != nil {
			t.Fatal(err)
		}
		if err := m.rotate(s.LogPath); err != nil {
			t.Fatal(err)
		}
		if n := size(s.LogPath) + size(s.LogPath+".1"); n > 2200 {
			t.Fatalf("after %d lines the logs have %d bytes", i, n)
		}
	}
	data, err := Since(s.LogPath, 0, 1<<20)
	if err != nil || len(data)%100 != 0 {
		t.Errorf("the log has %d bytes, %v: torn or with a hole", len(data), err)
	}
}

func TestStateHasNoSecrets(t *testing.T) {
	m, s := newMounter(t)
	st, err := newState(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(m.folder("s"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.save(&st); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(m.folder("s"), stateFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"SECRET", "AKID"} {
		if strings.Contains(string(data), secret) {
			t.Errorf("%q is in the state: %s", secret, data)
		}
	}
	got, err := m.load("s")
	if err != nil || !got.is(s) {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, change := range []func(*mount.Spec){
		func(s *mount.Spec) { s.SecretAccessKey = "x" },
		func(s *mount.Spec) { s.AccessKeyID = "x" },
		func(s *mount.Spec) { s.Prefix = "x" },
		func(s *mount.Spec) { s.Args = "--x" },
		func(s *mount.Spec) { s.UID = 7 },
		func(s *mount.Spec) { s.Point = "/x" },
	} {
		other := s
		if change(&other); got.is(other) {
			t.Errorf("%+v counts as the same", other)
		}
	}
	if err := os.WriteFile(filepath.Join(m.folder("s"), stateFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.load("s"); err == nil || errors.Is(err, mount.ErrNotFound) {
		t.Errorf("a damaged state: %v", err)
	}
}
