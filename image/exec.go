package image

import (
	"bufio"
	"embed"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// own is the source of the code that makes layers; see cacheKey.
//
//go:embed base.go tools.go layer.go
var own embed.FS

func sources(names ...string) []string {
	var out []string
	for _, name := range names {
		data, err := own.ReadFile(name)
		if err != nil {
			panic(err) // embedded above
		}
		out = append(out, string(data))
	}
	return out
}

func mustRead(name string) []byte {
	data, err := npmFiles.ReadFile(name)
	if err != nil {
		panic(err) // embedded
	}
	return data
}

// tailLines is how much of a failed command's output goes into its error.
const tailLines = 12

// run runs cmd, reports what it prints line by line, and puts its last lines into the error.
// With stdout not nil, standard output goes there instead and run ends only after stdout has.
func run(cmd *exec.Cmd, say func(string), stdout func(io.Reader) error) error {
	// A group of its own, so that a cancelled build also ends what cmd has started. SIGTERM lets
	// mmdebstrap unmount and remove its folder; after WaitDelay it is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second

	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	var out io.ReadCloser
	if stdout != nil {
		if out, err = cmd.StdoutPipe(); err != nil {
			return err
		}
	} else {
		cmd.Stdout = io.Discard
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var tail []string
	stderrDone := make(chan struct{})
	go func() {
		defer close(stderrDone)
		s := bufio.NewScanner(stderr)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			line := strings.TrimSpace(s.Text())
			if line == "" {
				continue
			}
			if tail = append(tail, line); len(tail) > tailLines {
				tail = tail[1:]
			}
			say(line)
		}
		_, _ = io.Copy(io.Discard, stderr) // a line over the limit must not block the command
	}()
	var outErr error
	if stdout != nil {
		if outErr = stdout(out); outErr != nil {
			// Nobody reads any more: end the command rather than wait for it to fill the pipe.
			_ = cmd.Cancel()
			_, _ = io.Copy(io.Discard, out)
		}
	}
	<-stderrDone
	if err := cmd.Wait(); err != nil {
		if len(tail) > 0 {
			err = fmt.Errorf("%w; it said:\n  %s", err, strings.Join(tail, "\n  "))
		}
		if outErr != nil && !errors.Is(outErr, io.ErrUnexpectedEOF) {
			return errors.Join(outErr, err)
		}
		return err
	}
	return outErr
}
