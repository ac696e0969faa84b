// Package freezer freezes a container's cgroup for a moment, by both versions of
// cgroups, in well under a millisecond. A child process holds it frozen: when the
// node daemon dies meanwhile, the child thaws it.
//
// The child is this very program; the init function below takes over when it is
// started under the child's name. The package imports next to nothing, so that
// this happens before the rest of the program initialises.
package freezer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	// childName is argv[0] of a child.
	childName = "cloudcode-freezer"
	// settleTimeout bounds how long processes may take to freeze: one that waits for
	// a device or a hung mount cannot.
	settleTimeout = 2 * time.Second
	// holdTimeout is the longest that a container is kept frozen, whatever happens.
	holdTimeout = 15 * time.Second
	thawTimeout = 5 * time.Second
)

// ErrGone: the process is not there any more.
var ErrGone = errors.New("no such process")

func init() {
	if os.Args[0] == childName {
		os.Exit(childMain(os.Args[1], os.Stdin, os.Stdout))
	}
}

// Freeze freezes all processes in the cgroup of a process, and returns what thaws
// them. They are thawed by themselves after 15 s, and when this program ends.
func Freeze(ctx context.Context, pid int) (thaw func() error, err error) {
	file, err := stateFile(pid)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName, file}
	cmd.Env = []string{"GOGC=off", "GOMAXPROCS=1"}
	cmd.Dir = "/"
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	thaw = func() error {
		closed := stdin.Close()
		late := time.AfterFunc(thawTimeout, func() { _ = cmd.Process.Kill() })
		defer late.Stop()
		if err := cmd.Wait(); err != nil {
			// Whatever has become of the child: nothing may stay frozen.
			if terr := set(file, false); terr != nil && !errors.Is(terr, os.ErrNotExist) {
				return fmt.Errorf("thawing: %w (%w: %s)", terr, err, strings.TrimSpace(stderr.String()))
			}
		}
		if errors.Is(closed, os.ErrClosed) {
			return nil
		}
		return closed
	}
	stop := context.AfterFunc(ctx, func() { _ = stdin.Close() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil && line == "frozen\n" {
		return thaw, nil
	}
	if cerr := ctx.Err(); cerr != nil {
		err = cerr
	} else {
		err = errors.New("the container does not freeze")
	}
	_ = thaw()
	return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
}

// childMain freezes, says so, and thaws when its input ends.
func childMain(file string, in io.Reader, out io.Writer) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		_ = set(file, false)
		return 1
	}
	if err := set(file, true); err != nil {
		return fail(err)
	}
	for until := time.Now().Add(settleTimeout); ; time.Sleep(200 * time.Microsecond) {
		frozen, err := settled(file)
		if err != nil {
			return fail(err)
		}
		if frozen {
			break
		}
		if time.Now().After(until) {
			return fail(fmt.Errorf("not frozen after %v: a process waits for a device or a mount that does not answer", settleTimeout))
		}
	}
	fmt.Fprintln(out, "frozen")
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, in)
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(holdTimeout):
		return fail(fmt.Errorf("thawed after %v by itself", holdTimeout))
	}
	if err := set(file, false); err != nil {
		return fail(err)
	}
	return 0
}

// v2 says which version of cgroups a state file is of.
func v2(file string) bool { return filepath.Base(file) == "cgroup.freeze" }

func set(file string, frozen bool) error {
	word := map[bool]string{true: "FROZEN", false: "THAWED"}[frozen]
	if v2(file) {
		word = map[bool]string{true: "1", false: "0"}[frozen]
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(word)
	return err
}

func settled(file string) (bool, error) {
	if !v2(file) {
		state, err := os.ReadFile(file)
		return strings.TrimSpace(string(state)) == "FROZEN", err
	}
	events, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cgroup.events"))
	return strings.Contains(string(events), "frozen 1\n"), err
}

// stateFile is what freezes the cgroup of a process.
func stateFile(pid int) (string, error) {
	groups, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %d", ErrGone, pid)
	}
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	unified := ""
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		switch {
		case hasWord(f[1], "freezer"):
			return inside(mounts, "cgroup", "freezer", f[2], "freezer.state")
		case f[0] == "0" && f[1] == "":
			unified = f[2]
		}
	}
	if unified == "" {
		return "", errors.New("this machine's cgroups cannot freeze")
	}
	return inside(mounts, "cgroup2", "", unified, "cgroup.freeze")
}

func hasWord(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// inside returns a file of a cgroup below the mount of its hierarchy.
func inside(mounts []byte, kind, controller, group, file string) (string, error) {
	if group == "/" {
		return "", errors.New("the process is in no cgroup of its own: freezing it would freeze the machine")
	}
	for line := range strings.Lines(string(mounts)) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 3 || g[0] != kind || controller != "" && !hasWord(g[2], controller) {
			continue
		}
		// What is mounted may be a part of the hierarchy.
		rel, err := filepath.Rel(f[3], group)
		if err != nil || strings.HasPrefix(rel, "..") {
			continue
		}
		path := filepath.Join(f[4], rel, file)
		if _, err := os.Stat(path); err != nil {
			return "", err
		}
		return path, nil
	}
	return "", fmt.Errorf("no mount of %s shows %s", kind, group)
}
