// Package process is what mounters have in common: a program that mounts, runs for
// as long as the mount is there, and outlives the node daemon.
//
// The program runs in a session of its own, with keys in its environment and
// nowhere else. What is known of it is in <Dir>/<id>/state.json (0700): its process
// id and start time, by which a restarted daemon finds it again and takes no other
// process for it, and what it mounts. It starts behind a gate that opens once that
// file is written: if the daemon dies before, the program never runs, and none runs
// that nobody knows of.
//
// Nothing here looks at a mount other than through fsop or mountinfo, and so
// nothing hangs with it. Linux 5.12 is needed (pidfd, openat2, mount_setattr).
package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/fsop"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/mountinfo"
)

// Driver is what differs between mounters.
type Driver interface {
	Name() string
	// FSType of its mounts, as in mountinfo.
	FSType() string
	// VersionOf the program at a path.
	VersionOf(ctx context.Context, program string) (string, error)
	// Command returns arguments and environment that mount s. The program must stay
	// in the foreground and print to its standard error output. dir is the mount's
	// own; what is in it is kept by Remount and removed otherwise. Returns ErrInvalid.
	Command(s mount.Spec, dir string) (args, env []string, err error)
	// Ready says why a mount that is there cannot be used. Only right after mounting.
	Ready(ctx context.Context, s mount.Spec, m Mounted) error
	// Sync is Mounter.Sync; at the end of ctx ErrNotFlushed, with what is not written.
	Sync(ctx context.Context, m Mounted) error
	// Words returns what a line of the program's log says, "" for nothing of interest.
	Words(line string) string
}

// Region that a mounter is to sign with, "" for the one that it takes by itself.
func Region(s mount.Spec) string {
	// "auto" is the name of a region with Tigris and R2 only.
	u, err := url.Parse(s.Endpoint)
	if s.Region == "auto" && (err != nil || !storage.IsTigris(s.Endpoint) && !strings.HasSuffix(u.Hostname(), ".r2.cloudflarestorage.com")) {
		return ""
	}
	return s.Region
}

// Mounted is a mount as drivers see it.
type Mounted struct {
	ID, Point, Dir, Log string
	Endpoint            string // of the object store
	m                   *Mounter
}

// Ask runs fn, which asks the mount by fsop. Once a request of this mount is stuck,
// further ones wait for it instead of getting stuck beside it.
func (m Mounted) Ask(ctx context.Context, fn func(context.Context) error) error {
	return m.m.ask(ctx, m.ID, "sync", fn)
}

// Config of a Mounter. Dir is needed.
type Config struct {
	Dir     string // absolute, for state; made with 0700
	Program string // name in PATH or path; empty: the driver's name
	Log     *slog.Logger

	MountTimeout time.Duration // from the start to the first answer; 1 min
	ProbeTimeout time.Duration // after which a mount counts as hung; 10 s
	FlushTimeout time.Duration // for all of Sync or Unmount, if ctx allows more; 5 min
	LogBytes     int64         // of a mounter's log; the one before is kept; 8 MiB
}

// Bounds that are nobody's choice.
const (
	killTimeout   = 1500 * time.Millisecond
	busyTimeout   = 2 * time.Second // unmounting, while somebody still looks
	exitTimeout   = 30 * time.Second
	tick          = 20 * time.Millisecond
	wordsBytes    = 32 << 10
	maxWords      = 5
	maxWordsBytes = 300
)

// Mounter implements mount.Mounter and mount.Remounter with a Driver.
type Mounter struct {
	Driver
	cfg Config

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	locks map[string]*lock
	stuck map[string]<-chan struct{} // by kind and id
}

// lock of one id.
type lock struct {
	ch     chan struct{} // capacity 1: held
	users  int
	cancel context.CancelFunc // of the holder
}

var (
	_ mount.Mounter   = (*Mounter)(nil)
	_ mount.Remounter = (*Mounter)(nil)
)

// New returns a Mounter. Close ends it and leaves its mounts alone.
func New(d Driver, cfg Config) (*Mounter, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("%w: state folder %q is not an absolute path", mount.ErrInvalid, cfg.Dir)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if cfg.Program == "" {
		cfg.Program = d.Name()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.MountTimeout = cmpDuration(cfg.MountTimeout, time.Minute)
	cfg.ProbeTimeout = cmpDuration(cfg.ProbeTimeout, 10*time.Second)
	cfg.FlushTimeout = cmpDuration(cfg.FlushTimeout, 5*time.Minute)
	if cfg.LogBytes <= 0 {
		cfg.LogBytes = 8 << 20
	}
	m := &Mounter{Driver: d, cfg: cfg, locks: map[string]*lock{}, stuck: map[string]<-chan struct{}{}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m, nil
}

func cmpDuration(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

// Close ends what runs here. Mounts stay.
func (m *Mounter) Close() {
	m.cancel()
	m.wg.Wait()
}

// Version implements mount.Mounter.
func (m *Mounter) Version(ctx context.Context) (string, error) {
	program, err := m.program()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return m.VersionOf(ctx, program)
}

func (m *Mounter) program() (string, error) {
	path, err := exec.LookPath(m.cfg.Program)
	if err != nil {
		return "", fmt.Errorf("%w: the program %s is not in PATH: %w", mount.ErrUnavailable, m.cfg.Program, err)
	}
	return filepath.Abs(path)
}

// Mount implements mount.Mounter.
func (m *Mounter) Mount(ctx context.Context, s mount.Spec) error { return m.mount(ctx, s, false) }

// Remount implements mount.Remounter.
func (m *Mounter) Remount(ctx context.Context, s mount.Spec) error { return m.mount(ctx, s, true) }

func (m *Mounter) mount(ctx context.Context, s mount.Spec, keep bool) error {
	if err := check(s); err != nil {
		return err
	}
	program, err := m.program()
	if err != nil {
		return err
	}
	ctx, done, err := m.begin(ctx, s.ID)
	if err != nil {
		return err
	}
	defer done()
	if s.Point, err = resolve(s.Point); err != nil {
		return fmt.Errorf("%w: folder %s: %w", mount.ErrFailed, s.Point, err)
	}
	st, err := m.load(s.ID)
	switch {
	case errors.Is(err, mount.ErrNotFound):
		keep = false
	case err != nil:
		return err
	default:
		keep = keep && st.Where == whereOf(s)
		err := m.probe(ctx, st)
		switch {
		case err == nil && st.is(s):
			return m.setReadOnly(st, false) // it is, if an Unmount of a daemon that died was under way
		case err == nil:
			if err := m.unmount(ctx, st); err != nil {
				return fmt.Errorf("the mount that was there: %w", err)
			}
		case ctx.Err() != nil:
			return ctx.Err()
		default:
			m.cfg.Log.Warn("mount is made anew", "id", s.ID, "reason", err)
			if err := m.kill(ctx, st); err != nil {
				return err
			}
		}
	}
	if !keep {
		if err := m.forget(s.ID); err != nil {
			return err
		}
	}
	if err := reachable(ctx, s); err != nil {
		return err
	}
	err = m.start(ctx, program, s)
	if err != nil && !keep {
		err = errors.Join(err, m.forget(s.ID))
	}
	return err
}

// reachable looks at the folder in the object store: it has better words for what
// is wrong than mounters, and some of them mount whatever they are given.
func reachable(ctx context.Context, s mount.Spec) error {
	store, err := objstore.Open(objstore.Config{
		Endpoint: s.Endpoint, Bucket: s.Bucket, AccessKeyID: s.AccessKeyID, SecretAccessKey: s.SecretAccessKey,
		Region: s.Region, PathStyle: s.PathStyle,
	})
	if err == nil {
		prefix := s.Prefix
		if prefix != "" {
			prefix += "/"
		}
		for _, err = range store.List(ctx, prefix, "/", "") {
			break
		}
		err = errors.Join(err, objstore.Close(store))
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: %w", mount.ErrFailed, err)
	}
	return err
}

// resolve returns the path by which mountinfo names the folder, which it makes. It
// does not look at the folder itself: that may be a dead mount.
func resolve(point string) (string, error) {
	parent := filepath.Dir(point)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return point, err
	}
	parent, err := filepath.EvalSymlinks(parent)
	if err != nil {
		return point, err
	}
	return filepath.Join(parent, filepath.Base(point)), nil
}

// start runs the program and waits until its mount answers.
func (m *Mounter) start(ctx context.Context, program string, s mount.Spec) (err error) {
	if err := m.clearPoint(ctx, s.Point); err != nil {
		return err
	}
	if err := os.Mkdir(s.Point, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: %w", mount.ErrFailed, err)
	}
	dir := m.folder(s.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	args, env, err := m.Command(s, dir)
	if err != nil {
		return err
	}
	if err := m.rotate(s.LogPath); err != nil {
		return err
	}
	st, err := newState(s)
	if err != nil {
		return err
	}
	logFrom := size(s.LogPath)
	p, err := m.spawn(&st, program, args, env)
	if err != nil {
		return fmt.Errorf("%w: %w", mount.ErrFailed, err)
	}
	defer p.close()
	wctx, cancel := context.WithTimeout(ctx, m.cfg.MountTimeout)
	defer cancel()
	err = m.waitMounted(wctx, &st, p)
	if err == nil {
		mounted := m.mounted(&st)
		err = m.ask(wctx, s.ID, "probe", func(ctx context.Context) error { return fsop.Stat(ctx, s.Point) })
		if err == nil {
			err = m.Ready(wctx, s, mounted)
		}
	}
	if err == nil {
		return nil
	}
	// Whatever it was, the program must not run on unknown. This is short, and needed also
	// where ctx has ended.
	kctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*killTimeout)
	defer cancel()
	kerr := m.kill(kctx, &st)
	if ctx.Err() != nil {
		return errors.Join(ctx.Err(), kerr)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %v", m.cfg.MountTimeout)
	}
	if words := m.words(s.LogPath, logFrom, s); words != "" {
		err = fmt.Errorf("%w: %s says: %s", err, m.Name(), words)
	}
	if !errors.Is(err, mount.ErrFailed) {
		err = fmt.Errorf("%w: %w", mount.ErrFailed, err)
	}
	return errors.Join(err, kerr)
}

// clearPoint removes a dead mount of ours that no state is left of, and refuses to
// mount over anything else.
func (m *Mounter) clearPoint(ctx context.Context, point string) error {
	at, err := mountinfo.At(point)
	if err != nil || len(at) == 0 {
		return err
	}
	if at[len(at)-1].FSType == m.FSType() {
		ctx, cancel := context.WithTimeout(ctx, m.cfg.ProbeTimeout)
		defer cancel()
		if err := fsop.Stat(ctx, point); errors.Is(err, unix.ENOTCONN) {
			return fsop.Detach(point)
		}
	}
	return fmt.Errorf("%w: a %s file system that is not ours is mounted at %s; unmount it", mount.ErrFailed, at[len(at)-1].FSType, point)
}

// gate starts "$@" once a line arrives on file 3, in the same process, and ends
// without it if that is closed: then whoever was to write it is dead.
const gate = `read -r go <&3 && [ "$go" = go ] && exec 3<&- && exec "$@"`

// spawn starts the program and writes its state, in an order that leaves no
// unknown program behind.
func (m *Mounter) spawn(st *state, program string, args, env []string) (*proc, error) {
	log, err := os.OpenFile(st.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command("/bin/sh", append([]string{"-c", gate, m.Name(), program}, args...)...)
	cmd.Env = append(environ(), env...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p, err := func() (*proc, error) {
		st.PID = cmd.Process.Pid
		if st.Start, err = startTime(st.PID); err != nil {
			return nil, err
		}
		p, err := openProc(st.PID, st.Start)
		if err != nil {
			return nil, err
		}
		if err := m.save(st); err != nil {
			p.close()
			return nil, err
		}
		return p, nil
	}()
	if err != nil {
		_ = w.Close() // the gate's end
		return nil, errors.Join(err, cmd.Wait())
	}
	m.wg.Go(func() { m.reap(cmd, st.PID, st.Start) })
	if _, err := w.WriteString("go\n"); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// environ is what every mounter gets. Of our own environment it is what the way to
// the object store needs; the rest may hold secrets of others.
func environ() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", "LANG=C.UTF-8"}
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// reap takes note of the end of a child, as long as we are there to.
func (m *Mounter) reap(cmd *exec.Cmd, pid int, start uint64) {
	p, err := openProc(pid, start)
	if err == nil {
		defer p.close()
		err = p.wait(m.ctx)
	}
	if err == nil || errors.Is(err, errGone) {
		_ = cmd.Wait() // returns at once; how it ended is in the log
	} else {
		_ = cmd.Process.Release()
	}
}

func (m *Mounter) waitMounted(ctx context.Context, st *state, p *proc) error {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		at, err := mountinfo.At(st.Point)
		if err != nil {
			return err
		}
		if len(at) > 0 && at[len(at)-1].FSType == m.FSType() {
			st.Dev = at[len(at)-1].Dev
			return m.save(st)
		}
		if p.ended() {
			return errors.New("the mounter has ended")
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *Mounter) mounted(st *state) Mounted {
	return Mounted{ID: st.ID, Point: st.Point, Dir: m.folder(st.ID), Log: st.Log, Endpoint: st.Where.Endpoint, m: m}
}

// here returns the mount itself, nil if it is gone, and other mounts of the same
// file system.
func (st *state) here() (own *mountinfo.Mount, others []string, err error) {
	all, err := mountinfo.All()
	if err != nil || st.Dev == "" {
		return nil, nil, err
	}
	for _, mi := range all {
		switch {
		case mi.Dev != st.Dev:
		case mi.Point == st.Point:
			own = &mi
		default:
			others = append(others, mi.Point)
		}
	}
	return own, others, nil
}

// Probe implements mount.Mounter.
func (m *Mounter) Probe(ctx context.Context, id string) error {
	st, err := m.load(id)
	if err != nil {
		return err
	}
	if done, ok := m.tryBegin(id); ok {
		err := m.rotate(st.Log)
		done()
		if err != nil {
			m.cfg.Log.Warn("log of a mounter cannot be shortened", "id", id, "error", err)
		}
	}
	return m.probe(ctx, st)
}

func (m *Mounter) probe(ctx context.Context, st *state) error {
	p, err := st.open()
	if errors.Is(err, errGone) {
		return fmt.Errorf("%s: %w", m.Name(), mount.ErrDead)
	}
	if err != nil {
		return err
	}
	defer p.close()
	own, _, err := st.here()
	if err != nil {
		return err
	}
	if own == nil {
		return fmt.Errorf("%s: %w", st.Point, mount.ErrDetached)
	}
	pctx, cancel := context.WithTimeout(ctx, m.cfg.ProbeTimeout)
	defer cancel()
	err = m.ask(pctx, st.ID, "probe", func(ctx context.Context) error { return fsop.Stat(ctx, st.Point) })
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s at %s: %w for %v", m.Name(), st.Point, mount.ErrHung, m.cfg.ProbeTimeout)
	case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED):
		return fmt.Errorf("%s: %w: %w", m.Name(), mount.ErrDead, err)
	}
	return fmt.Errorf("%s at %s: %w: %w", m.Name(), st.Point, mount.ErrHung, err)
}

// Sync implements mount.Mounter.
func (m *Mounter) Sync(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.FlushTimeout)
	defer cancel()
	ctx, done, err := m.begin(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	st, err := m.load(id)
	if err != nil {
		return err
	}
	return m.sync(ctx, st)
}

func (m *Mounter) sync(ctx context.Context, st *state) error {
	err := m.probe(ctx, st)
	if err == nil {
		err = m.Driver.Sync(ctx, m.mounted(st))
	}
	if err != nil && !errors.Is(err, mount.ErrNotFlushed) {
		err = fmt.Errorf("%w: %w", mount.ErrNotFlushed, err)
	}
	return err
}

// Unmount implements mount.Mounter.
func (m *Mounter) Unmount(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.FlushTimeout)
	defer cancel()
	ctx, done, err := m.begin(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	st, err := m.load(id)
	if errors.Is(err, mount.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return m.unmount(ctx, st)
}

func (m *Mounter) unmount(ctx context.Context, st *state) (err error) {
	p, err := st.open()
	if errors.Is(err, errGone) {
		return fmt.Errorf("%w: %s: %w before it was unmounted; what it had not written by then is missing (mount again, or abandon the mount)",
			mount.ErrNotFlushed, m.Name(), mount.ErrDead)
	}
	if err != nil {
		return err
	}
	defer p.close()
	own, others, err := st.here()
	if err != nil {
		return err
	}
	if len(others) > 0 {
		return fmt.Errorf("%w: it is attached at %s; detach that first", mount.ErrBusy, strings.Join(others, ", "))
	}
	// A mount that is gone already: an earlier try came this far, the mounter has not exited.
	if own != nil {
		// From here on nothing new is written: what Sync has seen is all.
		if err := m.setReadOnly(st, true); err != nil {
			return err
		}
		if err := m.sync(ctx, st); err != nil {
			return errors.Join(err, m.setReadOnly(st, false))
		}
		if err := umount(ctx, st.Point); err != nil {
			return errors.Join(err, m.setReadOnly(st, false))
		}
	}
	wctx, cancel := context.WithTimeout(ctx, exitTimeout)
	defer cancel()
	if err := p.wait(wctx); err != nil {
		return fmt.Errorf("%w: all is written and the mount is gone, but %s has not exited: another container or namespace may hold it (try again, or abandon it): %w",
			mount.ErrBusy, m.Name(), err)
	}
	return m.forget(st.ID)
}

// umount does not wait for the file system: nothing is left to write.
func umount(ctx context.Context, point string) error {
	ctx, cancel := context.WithTimeout(ctx, busyTimeout)
	defer cancel()
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unmounting %s: %w", point, err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: somebody has files or folders of %s open", mount.ErrBusy, point)
		}
	}
}

// setReadOnly changes this one mount, not the file system, and so asks nothing of
// the mounter.
func (m *Mounter) setReadOnly(st *state, on bool) error {
	own, _, err := st.here()
	if err != nil || own == nil || own.ReadOnly == on {
		return err
	}
	attr := &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if on {
		attr = &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	}
	err = unix.MountSetattr(unix.AT_FDCWD, st.Point, unix.AT_SYMLINK_NOFOLLOW, attr)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: files of %s are open for writing", mount.ErrBusy, st.Point)
	}
	if err != nil {
		return fmt.Errorf("making %s read-only: %w", st.Point, err)
	}
	return nil
}

// Abandon implements mount.Mounter.
func (m *Mounter) Abandon(ctx context.Context, id string) error {
	if !validID(id) {
		return fmt.Errorf("%w: id %q", mount.ErrInvalid, id)
	}
	// Before waiting for anybody: what else is done with this mount ends by it.
	m.interrupt(id)
	if st, err := m.load(id); err == nil {
		if p, err := st.open(); err == nil {
			_ = p.kill() // again below, where its errors count
			p.close()
		}
	}
	ctx, done, err := m.begin(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	st, err := m.load(id)
	if err != nil && !errors.Is(err, mount.ErrNotFound) {
		return err
	}
	if err == nil {
		if err := m.kill(ctx, st); err != nil {
			return err
		}
	}
	return m.forget(id)
}

// kill ends the mounter and then its mount. In this order: mounters write what
// they have left after an unmount.
func (m *Mounter) kill(ctx context.Context, st *state) error {
	p, err := st.open()
	if err != nil && !errors.Is(err, errGone) {
		return err
	}
	if p != nil {
		defer p.close()
		if err := p.kill(); err != nil {
			return fmt.Errorf("killing %s: %w", m.Name(), err)
		}
		ctx, cancel := context.WithTimeout(ctx, killTimeout)
		defer cancel()
		if err := p.wait(ctx); err != nil {
			return fmt.Errorf("%s (process %d) does not die: %w", m.Name(), st.PID, err)
		}
	}
	for range 64 {
		at, err := mountinfo.At(st.Point)
		if err != nil {
			return err
		}
		at = slices.DeleteFunc(at, func(mi mountinfo.Mount) bool { return mi.FSType != m.FSType() })
		if len(at) == 0 {
			return nil
		}
		err = unix.Unmount(st.Point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detaching %s: %w", st.Point, err)
		}
	}
	return fmt.Errorf("detaching %s: mounts keep appearing there", st.Point)
}

// List implements mount.Mounter.
func (m *Mounter) List(context.Context) ([]mount.Status, error) {
	entries, err := os.ReadDir(m.cfg.Dir)
	if err != nil {
		return nil, err
	}
	var all []mount.Status
	for _, e := range entries {
		if !e.IsDir() || !validID(e.Name()) {
			continue
		}
		st, err := m.load(e.Name())
		if errors.Is(err, mount.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		status := mount.Status{ID: st.ID, Point: st.Point, Since: st.Since}
		if p, err := st.open(); err == nil {
			status.PID = st.PID
			p.close()
		}
		all = append(all, status)
	}
	return all, nil
}

// ask runs fn unless an earlier request of that kind is stuck in this mount.
func (m *Mounter) ask(ctx context.Context, id, kind string, fn func(context.Context) error) error {
	key := kind + "/" + id
	m.mu.Lock()
	before := m.stuck[key]
	m.mu.Unlock()
	if before != nil {
		select {
		case <-before:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := fn(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.stuck, key)
	var stuck *fsop.StuckError
	if errors.As(err, &stuck) {
		m.stuck[key] = stuck.Done
	}
	return err
}

// begin makes the caller the only one who changes this mount. interrupt ends the
// context it returns.
func (m *Mounter) begin(ctx context.Context, id string) (context.Context, func(), error) {
	m.mu.Lock()
	l := m.locks[id]
	if l == nil {
		l = &lock{ch: make(chan struct{}, 1)}
		m.locks[id] = l
	}
	l.users++
	m.mu.Unlock()
	select {
	case l.ch <- struct{}{}:
	case <-ctx.Done():
		m.mu.Lock()
		m.leave(id, l)
		m.mu.Unlock()
		return nil, nil, ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	m.mu.Lock()
	l.cancel = cancel
	m.mu.Unlock()
	return ctx, func() {
		cancel()
		m.mu.Lock()
		defer m.mu.Unlock()
		l.cancel = nil
		<-l.ch
		m.leave(id, l)
	}, nil
}

func (m *Mounter) leave(id string, l *lock) {
	if l.users--; l.users == 0 {
		delete(m.locks, id)
	}
}

// tryBegin is begin for what can as well be done later.
func (m *Mounter) tryBegin(id string) (done func(), ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locks[id] != nil {
		return nil, false
	}
	l := &lock{ch: make(chan struct{}, 1), users: 1}
	l.ch <- struct{}{}
	m.locks[id] = l
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		<-l.ch
		m.leave(id, l)
	}, true
}

func (m *Mounter) interrupt(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.locks[id]; l != nil && l.cancel != nil {
		l.cancel()
	}
}
