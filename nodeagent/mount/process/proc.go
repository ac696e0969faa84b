package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// proc is a process, known by its id and its start: ids are given again. While it
// is open the kernel keeps it apart from any later process of that id.
type proc struct {
	pid int
	f   *os.File // pidfd
}

// errGone: the process has ended, or its id is another's now.
var errGone = errors.New("process is gone")

// openProc returns errGone if the process is dead, a zombie too, or is another.
func openProc(pid int, start uint64) (*proc, error) {
	if pid <= 0 {
		return nil, errGone
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	p := &proc{pid: pid, f: os.NewFile(uintptr(fd), "pidfd")}
	// Looked at after it was opened: if it is the one now, the pidfd is its.
	if got, err := startTime(pid); err != nil || got != start || p.ended() {
		p.close()
		return nil, errGone
	}
	return p, nil
}

func (p *proc) close() { _ = p.f.Close() }

func (p *proc) kill() error {
	err := p.control(func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func (p *proc) control(fn func(fd int) error) error {
	c, err := p.f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := c.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

func (p *proc) ended() bool {
	var n int
	err := p.control(func(fd int) (err error) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err
	})
	return err == nil && n > 0
}

// wait returns nil once the process has ended. It needs no thread meanwhile.
func (p *proc) wait(ctx context.Context) error {
	c, err := p.f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.f.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			_ = p.f.SetReadDeadline(time.Time{})
		}
	}()
	err = c.Read(func(uintptr) bool { return p.ended() })
	if p.ended() {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// startTime of a process in ticks since boot, from /proc/PID/stat.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold anything.
	_, rest, ok := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, fmt.Errorf("unexpected /proc/%d/stat", pid)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// bootID tells start times of different boots apart.
func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
}
