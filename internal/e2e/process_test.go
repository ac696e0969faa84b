//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// process is one of our commands, running. Its output goes to one file over all
// its restarts.
type process struct {
	name string
	args []string
	env  []string
	log  string

	cmd    *exec.Cmd
	exited chan struct{} // closed when it has
	err    error         // of Wait, once exited
}

func newProcess(dir, name string, env []string, args ...string) *process {
	return &process{name: name, args: args, env: env, log: filepath.Join(dir, name+".log")}
}

func (p *process) start(tb testing.TB) {
	tb.Helper()
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	defer out.Close()
	fmt.Fprintf(out, "--- start: cloudcode %s\n", strings.Join(p.args, " "))
	p.cmd = exec.Command(work.bin, p.args...)
	p.cmd.Env = cleanEnv(p.env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	// A group of its own, as from a shell: a Ctrl-C of the test run is ours to pass on.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		tb.Fatalf("start %s: %v", p.name, err)
	}
	p.exited = make(chan struct{})
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
}

func (p *process) running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill is kill -9 of this process alone: what it started goes on.
func (p *process) kill(tb testing.TB) {
	tb.Helper()
	p.signal(tb, syscall.SIGKILL, 10*time.Second)
}

// signal waits for the process to end of it.
func (p *process) signal(tb testing.TB, sig syscall.Signal, most time.Duration) {
	tb.Helper()
	if !p.running() {
		tb.Fatalf("%s has ended by itself: %v\n%s", p.name, p.err, p.tail(30))
	}
	if err := p.cmd.Process.Signal(sig); err != nil {
		tb.Fatalf("signal %s: %v", p.name, err)
	}
	select {
	case <-p.exited:
	case <-time.After(most):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT) // shows where it hangs
		select {
		case <-p.exited:
		case <-time.After(5 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.exited
		}
		tb.Fatalf("%s did not end within %v of %v\n%s", p.name, most, sig, p.tail(60))
	}
}

// stop ends the process if it runs, and never fails.
func (p *process) stop() error {
	if !p.running() {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		return nil
	case <-time.After(40 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.exited
		return fmt.Errorf("%s had to be killed", p.name)
	}
}

// exitCode of a process that has ended by itself; -1 for a signal.
func (p *process) exitCode() int {
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

func (p *process) output() string {
	b, _ := os.ReadFile(p.log)
	return string(b)
}

func (p *process) tail(n int) string {
	lines := strings.Split(strings.TrimRight(p.output(), "\n"), "\n")
	return fmt.Sprintf("---- last lines of %s\n%s\n----", p.name, strings.Join(lines[max(0, len(lines)-n):], "\n"))
}

// cleanEnv is the environment without anything that would configure our
// commands, and with extra.
func cleanEnv(extra ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		switch name, _, _ := strings.Cut(kv, "="); {
		case strings.HasPrefix(name, "CLOUDCODE_"), strings.HasPrefix(name, "SERVER_"), strings.HasPrefix(name, "OPENCODE_"),
			strings.HasPrefix(name, "S3_"), strings.HasPrefix(name, "AWS_"), strings.HasPrefix(name, "TIGRISFS_"):
		case strings.HasSuffix(strings.ToLower(name), "_proxy"):
		default:
			env = append(env, kv)
		}
	}
	return append(env, extra...)
}

// run runs a command to its end and returns its output.
func run(tb testing.TB, most time.Duration, env []string, name string, args ...string) (stdout, stderr string, err error) {
	tb.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = env
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return "", "", err
	}
	timer := time.AfterFunc(most, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err = cmd.Wait()
	if !timer.Stop() {
		err = fmt.Errorf("not done within %v: %w", most, err)
	}
	return out.String(), errOut.String(), err
}

// mustRun fails the test with all output when the command fails.
func mustRun(tb testing.TB, most time.Duration, env []string, name string, args ...string) string {
	tb.Helper()
	stdout, stderr, err := run(tb, most, env, name, args...)
	if err != nil {
		tb.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout
}

// eventually polls until ok returns "", which otherwise says what is missing.
func eventually(tb testing.TB, most time.Duration, what string, ok func() string) {
	tb.Helper()
	deadline := time.NewTimer(most)
	defer deadline.Stop()
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	for {
		missing := ok()
		if missing == "" {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			tb.Fatalf("%s: not within %v: %s", what, most, missing)
		}
	}
}
