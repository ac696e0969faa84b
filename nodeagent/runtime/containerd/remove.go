package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

const (
	// killTimeout bounds how long a SIGKILLed container may take to be gone. More
	// means a process stuck in the kernel, mostly on a dead network file system.
	killTimeout = 20 * time.Second
	// removeTimeout bounds a whole removal beside the grace.
	removeTimeout = time.Minute
)

// Stop implements runtime.Runtime.
func (r *Runtime) Stop(ctx context.Context, session string, grace time.Duration) error {
	unlock, err := r.locks.lock(ctx, session)
	if err != nil {
		return err
	}
	defer unlock()
	return classify(r.remove(r.ns(ctx), session, grace))
}

// Kill implements runtime.Runtime.
func (r *Runtime) Kill(ctx context.Context, session string) error {
	return r.Stop(ctx, session, 0)
}

// remove takes away whatever there is of a session's container. It is
// idempotent, and may be called on any half-made state.
//
// The order matters: the process first; then the network by CNI while its
// namespace is still pinned; then the container; the snapshot after it, because
// the container refers to it; the record last, because it is how a later call
// finds what this one left.
func (r *Runtime) remove(ctx context.Context, session string, grace time.Duration) error {
	if !runtime.ValidSession(session) {
		return fmt.Errorf("%w: session %q", runtime.ErrInvalidSpec, session)
	}
	ctx, cancel := context.WithTimeout(ctx, grace+removeTimeout)
	defer cancel()
	if err := r.removeTask(ctx, session, grace); err != nil {
		return err
	}
	if err := r.removeNetwork(ctx, session); err != nil {
		return err
	}
	if err := r.client.ContainerService().Delete(ctx, session); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("removing the container of session %s: %w", session, err)
	}
	if err := r.client.SnapshotService(snapshotter).Remove(ctx, session); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("removing the snapshot of session %s: %w", session, err)
	}
	return r.dropRecord(session)
}

func (r *Runtime) removeNetwork(ctx context.Context, session string) error {
	pin := r.netnsPath(session)
	_, rerr := os.Lstat(r.sessionDir(session))
	_, perr := os.Lstat(pin)
	if os.IsNotExist(rerr) && os.IsNotExist(perr) {
		return nil // never connected
	}
	if err := r.net.del(ctx, session, pin); err != nil {
		return err
	}
	return unpinNetns(pin)
}

func (r *Runtime) removeTask(ctx context.Context, session string, grace time.Duration) error {
	task, err := r.task(ctx, session)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	st, err := task.Status(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if st.Status == ctd.Running {
		r.thaw(int(task.Pid())) // on cgroup v1 no signal reaches what is frozen
	}
	if st.Status != ctd.Stopped {
		if err := r.end(ctx, session, task, st.Status, grace); err != nil {
			return err
		}
	}
	dctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	// Also kills a task that was made but never started.
	if _, err := task.Delete(dctx, ctd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("removing the process of session %s: %w", session, err)
	}
	return nil
}

// end ends a live task: SIGTERM and grace, then SIGKILL.
func (r *Runtime) end(ctx context.Context, session string, task ctd.Task, st ctd.ProcessStatus, grace time.Duration) error {
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	exited, err := task.Wait(wctx)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	paused := st == ctd.Paused || st == ctd.Pausing
	if grace > 0 && st != ctd.Created {
		if paused {
			if err := task.Resume(ctx); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("resuming session %s to stop it: %w", session, err)
			}
			paused = false
		}
		if err := task.Kill(ctx, syscall.SIGTERM); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("stopping session %s: %w", session, err)
		}
		if gone, err := waitFor(ctx, exited, grace); gone || err != nil {
			return err
		}
	}
	// A frozen task gets its SIGKILL first and is thawed then, so that nothing
	// of it runs in between.
	if err := task.Kill(ctx, syscall.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("killing session %s: %w", session, err)
	}
	if paused {
		if err := task.Resume(ctx); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			r.log.Debug("thawing a killed session", "session", session, "err", err)
		}
	}
	gone, err := waitFor(ctx, exited, killTimeout)
	if err == nil && !gone {
		err = fmt.Errorf("%w: session %s did not die within %s of SIGKILL; a process is stuck in the kernel",
			runtime.ErrUnavailable, session, killTimeout)
	}
	return err
}

func waitFor(ctx context.Context, exited <-chan ctd.ExitStatus, d time.Duration) (bool, error) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case st := <-exited:
		if err := st.Error(); err != nil && !errdefs.IsNotFound(err) {
			return false, err
		}
		return true, nil
	case <-t.C:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// List implements runtime.Runtime.
func (r *Runtime) List(ctx context.Context) ([]runtime.Instance, error) {
	ctx = r.ns(ctx)
	sessions, err := r.containers(ctx)
	if err != nil {
		return nil, classify(err)
	}
	var out []runtime.Instance
	for _, s := range sessions {
		inst, _, err := r.inspect(ctx, s)
		if err == nil {
			out = append(out, inst)
			continue
		}
		if !errors.Is(err, runtime.ErrNotFound) {
			return nil, classify(err)
		}
		if err := r.removeLeftover(ctx, s); err != nil {
			r.log.Error("removing a half-made container", "session", s, "err", err)
		}
	}
	return out, nil
}

// containers lists the sessions that containerd knows a container of.
func (r *Runtime) containers(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	list, err := r.client.ContainerService().List(ctx, fmt.Sprintf("labels.%q", labelSession))
	if err != nil {
		return nil, fmt.Errorf("listing containers: %w", err)
	}
	var out []string
	for _, c := range list {
		if c.Labels[labelSession] == c.ID {
			out = append(out, c.ID)
		}
	}
	return out, nil
}

// removeLeftover removes what inspect does not find whole, unless another call
// is at work on it right now.
func (r *Runtime) removeLeftover(ctx context.Context, session string) error {
	unlock := r.locks.tryLock(session)
	if unlock == nil {
		return nil
	}
	defer unlock()
	if _, _, err := r.inspect(ctx, session); !errors.Is(err, runtime.ErrNotFound) {
		return err // whole by now, or unknown
	}
	r.log.Info("removing a half-made container", "session", session)
	return r.remove(ctx, session, 0)
}

// reconcile removes records, namespaces and addresses of sessions that have no
// container any more: what a daemon that was killed left.
func (r *Runtime) reconcile(ctx context.Context) error {
	live := map[string]bool{}
	sessions, err := r.containers(ctx)
	if err != nil {
		return classify(err)
	}
	for _, s := range sessions {
		live[s] = true
	}
	stale := map[string]bool{}
	for _, dir := range []string{sessionsDir(r.cfg.StateDir), netnsDir(r.cfg.StateDir)} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			stale[e.Name()] = true
		}
	}
	held, err := r.net.allocated()
	if err != nil {
		return err
	}
	for _, id := range held {
		stale[id] = true
	}
	for s := range stale {
		if live[s] || !runtime.ValidSession(s) {
			continue
		}
		r.log.Info("removing what is left of a session without a container", "session", s)
		if err := errors.Join(
			r.net.del(ctx, s, r.netnsPath(s)),
			unpinNetns(r.netnsPath(s)),
			r.dropRecord(s),
		); err != nil {
			r.log.Error("removing leftovers", "session", s, "err", err)
		}
		if err := r.client.SnapshotService(snapshotter).Remove(ctx, s); err != nil && !errdefs.IsNotFound(err) {
			r.log.Error("removing a leftover snapshot", "session", s, "err", err)
		}
	}
	return nil
}
