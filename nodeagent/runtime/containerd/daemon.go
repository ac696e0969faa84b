package containerd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/cleanenv"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

const (
	daemonStartTimeout = 30 * time.Second
	daemonStopTimeout  = 10 * time.Second
	maxBackoff         = 10 * time.Second
)

// DaemonConfig says where a private containerd lives.
type DaemonConfig struct {
	// BinDir holds containerd, containerd-shim-runc-v2 and runc. What is not
	// there is taken from PATH. It may be empty.
	BinDir string
	// Dir keeps images, snapshots, configuration and log. It survives reboots.
	Dir string
	// RunDir holds socket and state of running tasks. Empty: a folder below
	// /run/cloudcode that is named after Dir, because a socket's path may have
	// 107 bytes only.
	RunDir string
	// Logger may be nil.
	Logger *slog.Logger
}

// Daemon is a private containerd. It is a process of its own session: it and
// the containers outlive the program that started it.
//
// If it dies while we watch, it is started again, with a growing pause; the
// containers run on meanwhile, because their shims hold them.
type Daemon struct {
	cfg  DaemonConfig
	log  *slog.Logger
	bin  string
	conf string

	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	proc   *process
	ended  bool // Stop was called: no more restarts
}

// process is a containerd that we may signal: the pidfd stands for that very
// process, even after its number was given to another one.
type process struct {
	pid   int
	pidfd int
	cmd   *exec.Cmd // nil when adopted
}

// StartDaemon adopts the containerd that already serves cfg's socket, or
// starts one, and returns when it answers: within half a minute, or with an
// error that has the last lines of its log.
func StartDaemon(ctx context.Context, cfg DaemonConfig) (*Daemon, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("containerd folder %q is not an absolute path", cfg.Dir)
	}
	if cfg.RunDir == "" {
		sum := sha256.Sum256([]byte(filepath.Clean(cfg.Dir)))
		cfg.RunDir = filepath.Join("/run/cloudcode", hex.EncodeToString(sum[:4]))
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Daemon{cfg: cfg, log: cfg.Logger, conf: filepath.Join(cfg.Dir, "config.toml")}
	if len(d.Address()) > 104 {
		return nil, fmt.Errorf("the socket path %s is longer than 104 bytes; choose a shorter run folder", d.Address())
	}
	var err error
	if d.bin, err = d.lookup("containerd"); err != nil {
		return nil, err
	}
	for _, p := range []string{"containerd-shim-runc-v2", "runc"} {
		if _, err := d.lookup(p); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{cfg.Dir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, err
		}
	}
	d.checkRunc(ctx)
	if err := d.bring(ctx); err != nil {
		return nil, err
	}
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	d.cancel = cancel
	d.wg.Go(func() { d.watch(wctx) })
	return d, nil
}

// Address returns the socket's path.
func (d *Daemon) Address() string { return filepath.Join(d.cfg.RunDir, "containerd.sock") }

// LogFile returns the path of containerd's own log.
func (d *Daemon) LogFile() string { return filepath.Join(d.cfg.Dir, "containerd.log") }

// PID returns the process id of the containerd that runs now, 0 for none.
func (d *Daemon) PID() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.proc == nil {
		return 0
	}
	return d.proc.pid
}

func (d *Daemon) lookup(name string) (string, error) {
	if d.cfg.BinDir != "" {
		p := filepath.Join(d.cfg.BinDir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is neither in %q nor in PATH; `make tools` builds it: %w", name, d.cfg.BinDir, err)
	}
	return p, nil
}

func (d *Daemon) checkRunc(ctx context.Context) {
	p, err := d.lookup("runc")
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, p, "--version").Output()
	if f := strings.Fields(string(out)); err == nil && len(f) >= 3 {
		warnVersion(d.log, "runc", f[2])
	}
}

// bring makes sure that a containerd serves, and sets proc.
func (d *Daemon) bring(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, daemonStartTimeout)
	defer cancel()
	// Two of us must not start one each: the second would take over the socket
	// and leave the first running unseen.
	unlock, err := lockFile(ctx, filepath.Join(d.cfg.Dir, "lock"))
	if err != nil {
		return fmt.Errorf("another process is starting containerd in %s: %w", d.cfg.Dir, err)
	}
	defer unlock()
	if p := adopt(d.Address()); p != nil {
		if err := d.serving(ctx, p, 10*time.Second); err == nil {
			d.set(p)
			d.log.Info("using the containerd that already runs", "pid", p.pid, "address", d.Address())
			return nil
		}
		// It holds the socket but does not answer. Its containers do not
		// depend on it.
		d.log.Warn("containerd does not answer; starting another one", "pid", p.pid)
		p.signal(unix.SIGKILL)
		if !p.wait(ctx) {
			return fmt.Errorf("%w: containerd %d neither answers nor dies", runtime.ErrUnavailable, p.pid)
		}
		p.close()
	}
	p, err := d.spawn()
	if err != nil {
		return err
	}
	if err := d.serving(ctx, p, daemonStartTimeout); err != nil {
		p.signal(unix.SIGKILL)
		kctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), daemonStopTimeout)
		defer cancel()
		p.wait(kctx)
		p.close()
		return fmt.Errorf("%w: containerd did not start: %w; the end of %s:\n%s",
			runtime.ErrUnavailable, err, d.LogFile(), lastLines(d.LogFile(), 12))
	}
	d.set(p)
	return nil
}

func (d *Daemon) set(p *process) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.proc = p
}

func (d *Daemon) spawn() (*process, error) {
	if err := os.WriteFile(d.conf, []byte(d.config()), 0o600); err != nil {
		return nil, err
	}
	logFile, err := os.OpenFile(d.LogFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	cmd := exec.Command(d.bin, "--config", d.conf) // not CommandContext: it outlives us
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Dir = "/"
	cmd.Env = cleanenv.Environ()
	if d.cfg.BinDir != "" { // so that it finds our shim and runc before the machine's
		cmd.Env = append(cmd.Env, "PATH="+d.cfg.BinDir+string(os.PathListSeparator)+os.Getenv("PATH"))
	}
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", d.bin, err)
	}
	if pidfd < 0 {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, errors.New("this kernel has no pidfd; Linux 5.10 or newer is needed")
	}
	d.log.Info("started containerd", "pid", cmd.Process.Pid, "address", d.Address())
	return &process{pid: cmd.Process.Pid, pidfd: pidfd, cmd: cmd}, nil
}

// config is understood by containerd 1.6 and newer: each release still reads
// the older format, and plugins it does not know are no error in the list.
func (d *Daemon) config() string {
	disabled := []string{
		"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
		"io.containerd.podsandbox.controller.v1.podsandbox",
		"io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
		"io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs",
		"io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
		"io.containerd.differ.v1.erofs", "io.containerd.mount-handler.v1.erofs",
		"io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
		"io.containerd.internal.v1.tracing", "io.containerd.monitor.container.v1.restart",
		"io.containerd.image-verifier.v1.bindir",
	}
	return fmt.Sprintf(`# Written by cloudcode at every start of containerd; changes are lost.
version = 2
root = %q
state = %q
disabled_plugins = ["%s"]

[grpc]
address = %q

[ttrpc]
address = %q

[debug]
level = "warn"

[plugins."io.containerd.internal.v1.opt"]
path = %q
`, filepath.Join(d.cfg.Dir, "root"), filepath.Join(d.cfg.RunDir, "state"), strings.Join(disabled, `", "`),
		d.Address(), d.Address()+".ttrpc", filepath.Join(d.cfg.Dir, "opt"))
}

// serving waits until p answers or dies.
func (d *Daemon) serving(ctx context.Context, p *process, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		if err := ping(ctx, d.Address()); err == nil {
			return nil
		}
		step, scancel := context.WithTimeout(ctx, 20*time.Millisecond)
		dead := p.wait(step)
		scancel()
		if dead {
			return errors.New("it ended at once")
		}
		if ctx.Err() != nil {
			return fmt.Errorf("no answer within %s", timeout)
		}
	}
}

func ping(ctx context.Context, address string) error {
	if _, err := os.Stat(address); err != nil {
		return err
	}
	c, err := ctd.New(address, ctd.WithTimeout(2*time.Second))
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = c.Version(ctx)
	return err
}

// adopt finds the process that listens on a socket, nil if there is none. The
// kernel says which: no pid file that could name another process.
func adopt(address string) *process {
	conn, err := net.DialTimeout("unix", address, time.Second)
	if err != nil {
		return nil
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return nil
	}
	pidfd, err := unix.PidfdOpen(int(cred.Pid), 0)
	if err != nil {
		return nil
	}
	p := &process{pid: int(cred.Pid), pidfd: pidfd}
	// Between the two calls the number may have gone to another process; one
	// that still listens here is the one we asked about.
	if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.pid)); err != nil || strings.TrimSpace(string(comm)) != "containerd" {
		p.close()
		return nil
	}
	return p
}

func (p *process) signal(sig unix.Signal) { _ = unix.PidfdSendSignal(p.pidfd, sig, nil, 0) }

func (p *process) close() { _ = unix.Close(p.pidfd) }

// wait returns whether the process has ended, when it has or when ctx ends.
func (p *process) wait(ctx context.Context) bool {
	// The end of ctx is a second descriptor to wait for: no polling.
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(wake)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-woken // it must not write to a closed descriptor
		}
	}()
	for {
		fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false
		case fds[0].Revents != 0:
			if p.cmd != nil {
				_ = p.cmd.Wait() // reap; it has ended, so this returns at once
				p.cmd = nil
			}
			return true
		default:
			return false
		}
	}
}

// watch restarts containerd when it dies.
func (d *Daemon) watch(ctx context.Context) {
	backoff := 100 * time.Millisecond
	for {
		d.mu.Lock()
		p := d.proc
		d.mu.Unlock()
		started := time.Now()
		if !p.wait(ctx) {
			return
		}
		d.mu.Lock()
		ended := d.ended
		d.mu.Unlock()
		if ended {
			return
		}
		p.close()
		if time.Since(started) > time.Minute {
			backoff = 100 * time.Millisecond
		}
		for {
			d.log.Error("containerd died; starting it again; containers run on", "in", backoff, "log", lastLines(d.LogFile(), 3))
			t := time.NewTimer(backoff)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				d.set(nil)
				return
			}
			backoff = min(2*backoff, maxBackoff)
			err := d.bring(ctx)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				d.set(nil)
				return
			}
			d.log.Error("starting containerd", "err", err)
		}
	}
}

// Close stops watching. containerd and containers go on running.
func (d *Daemon) Close() error {
	d.cancel()
	d.wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.proc != nil {
		d.proc.close()
		d.proc = nil
	}
	return nil
}

// Stop ends containerd: SIGTERM, and SIGKILL after ten seconds or with ctx.
// Stop the containers before: they would run on without it. The run folder is
// removed, the data stays.
func (d *Daemon) Stop(ctx context.Context) error {
	d.mu.Lock()
	d.ended = true
	d.mu.Unlock()
	d.cancel()
	d.wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.proc == nil {
		return nil
	}
	defer func() {
		d.proc.close()
		d.proc = nil
	}()
	d.proc.signal(unix.SIGTERM)
	tctx, cancel := context.WithTimeout(ctx, daemonStopTimeout)
	defer cancel()
	if !d.proc.wait(tctx) {
		d.log.Warn("containerd ignores SIGTERM; killing it", "pid", d.proc.pid)
		d.proc.signal(unix.SIGKILL)
		kctx, kcancel := context.WithTimeout(context.WithoutCancel(ctx), daemonStopTimeout)
		defer kcancel()
		if !d.proc.wait(kctx) {
			return fmt.Errorf("containerd %d does not die", d.proc.pid)
		}
	}
	return d.removeRunDir()
}

// removeRunDir leaves the state of tasks that still run alone.
func (d *Daemon) removeRunDir() error {
	tasks, _ := filepath.Glob(filepath.Join(d.cfg.RunDir, "state", "io.containerd.runtime.v2.task", "*", "*"))
	if len(tasks) > 0 {
		d.log.Warn("containerd was stopped under running containers", "count", len(tasks))
		return nil
	}
	return os.RemoveAll(d.cfg.RunDir)
}

// lockFile waits for an exclusive lock, which ends with this process at the latest.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			_ = f.Close()
			return nil, errors.Join(ctx.Err(), err)
		}
	}
}

func lastLines(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const most = 16 << 10
	if fi, err := f.Stat(); err == nil && fi.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd)
	}
	data, _ := io.ReadAll(f)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
