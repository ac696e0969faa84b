package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	ctd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
)

// Ensure implements runtime.Runtime.
//
// What a container wrote to its root file system outlives the container when
// spec.ScratchDir is set and the image stays the same: a restarted session
// keeps what it installed.
func (r *Runtime) Ensure(ctx context.Context, spec runtime.Spec, hooks *runtime.Hooks) (runtime.Instance, error) {
	if err := runtime.ValidateSpec(spec); err != nil {
		return runtime.Instance{}, err
	}
	ctx = r.ns(ctx)
	unlock, err := r.locks.lock(ctx, spec.Session)
	if err != nil {
		return runtime.Instance{}, err
	}
	defer unlock()

	inst, rec, err := r.inspect(ctx, spec.Session)
	switch {
	case err == nil:
		if rec.Spec.Generation > spec.Generation {
			return runtime.Instance{}, fmt.Errorf("%w: session %s is at generation %d, asked for %d",
				runtime.ErrStaleGeneration, spec.Session, rec.Spec.Generation, spec.Generation)
		}
		if inst.State != runtime.StateExited && runtime.SameContainer(rec.Spec, spec) {
			inst, err = r.adjust(ctx, inst, rec, spec)
			return inst, classify(err)
		}
	case !errors.Is(err, runtime.ErrNotFound):
		return runtime.Instance{}, classify(err)
	}

	img, err := r.image(ctx, spec.Image, hooks.Report)
	if err != nil {
		return runtime.Instance{}, classify(err)
	}
	hooks.Report(runtime.Progress{Phase: runtime.PhaseContainer, Detail: "creating the container"})
	// Whatever there is goes first: two containers of a session must never
	// write to its workspace together.
	if err := r.remove(ctx, spec.Session, 0); err != nil {
		return runtime.Instance{}, classify(err)
	}
	if err := hooks.BeforeCreate(ctx); err != nil {
		return runtime.Instance{}, err
	}
	inst, err = r.create(ctx, spec, img, hooks)
	if err != nil {
		cctx, cancel := afterwards(ctx)
		defer cancel()
		if rerr := r.remove(cctx, spec.Session, 0); rerr != nil {
			r.log.Error("cleaning up after a failed start", "session", spec.Session, "err", rerr)
		}
		return runtime.Instance{}, classify(fmt.Errorf("starting the container of session %s: %w", spec.Session, err))
	}
	return inst, nil
}

// adjust brings a live container that differs in generation, resources or
// pause only to spec.
func (r *Runtime) adjust(ctx context.Context, inst runtime.Instance, rec record, spec runtime.Spec) (runtime.Instance, error) {
	task, err := r.task(ctx, spec.Session)
	if err != nil {
		return runtime.Instance{}, err
	}
	if rec.Spec.Resources != spec.Resources {
		if err := task.Update(ctx, ctd.WithResources(resources(spec.Resources, true))); err != nil {
			return runtime.Instance{}, fmt.Errorf("changing the limits of session %s: %w", spec.Session, err)
		}
	}
	if rec.Spec.Generation != spec.Generation || rec.Spec.Resources != spec.Resources {
		// The record first: it is the fencing token's only truth.
		rec.Spec = spec
		if err := r.saveRecord(rec); err != nil {
			return runtime.Instance{}, err
		}
		c, err := r.client.LoadContainer(ctx, spec.Session)
		if err != nil {
			return runtime.Instance{}, err
		}
		if _, err := c.SetLabels(ctx, map[string]string{labelGeneration: strconv.FormatUint(spec.Generation, 10)}); err != nil {
			return runtime.Instance{}, err
		}
	}
	if inst.State == runtime.StatePaused {
		if err := task.Resume(ctx); err != nil {
			return runtime.Instance{}, fmt.Errorf("resuming session %s: %w", spec.Session, err)
		}
	}
	inst, _, err = r.inspect(ctx, spec.Session)
	return inst, err
}

// create makes everything anew. The caller cleans up after an error.
func (r *Runtime) create(ctx context.Context, spec runtime.Spec, img ctd.Image, hooks *runtime.Hooks) (runtime.Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	// Without a lease the collector may take the snapshot before the
	// container refers to it.
	ctx, done, err := r.client.WithLease(ctx)
	if err != nil {
		return runtime.Instance{}, err
	}
	defer func() {
		cctx, cancel := afterwards(ctx)
		defer cancel()
		if err := done(cctx); err != nil {
			r.log.Warn("releasing a containerd lease", "session", spec.Session, "err", err)
		}
	}()

	for _, m := range spec.Mounts {
		if _, err := os.Stat(m.Source); err != nil {
			return runtime.Instance{}, fmt.Errorf("mount at %s: %w", m.Destination, err)
		}
	}
	if err := os.MkdirAll(spec.LogDir, 0o700); err != nil {
		return runtime.Instance{}, err
	}
	clock := newStopwatch()
	rec := record{Spec: spec, ImageDigest: img.Target().Digest.String(), StartedAt: time.Now().UTC()}
	if err := r.saveRecord(rec); err != nil {
		return runtime.Instance{}, err
	}
	files, err := r.writeFiles(spec)
	if err != nil {
		return runtime.Instance{}, err
	}
	ociSpec, err := r.ociSpec(ctx, spec, img, files)
	if err != nil {
		return runtime.Instance{}, err
	}
	rootfs, err := r.rootfs(ctx, spec, img)
	if err != nil {
		return runtime.Instance{}, err
	}

	clock.lap("rootfs")

	// The snapshot is not set as the container's own: containerd would mount
	// it beside the root file system given to NewTask. The label keeps it from
	// being collected for as long as the container exists.
	copts := []ctd.NewContainerOpts{
		ctd.WithImage(img),
		ctd.WithSpec(ociSpec),
		// Only these: an image's labels must never become a container's
		// (CVE-2026-53488).
		ctd.WithContainerLabels(map[string]string{
			labelSession:    spec.Session,
			labelGeneration: strconv.FormatUint(spec.Generation, 10),
			"containerd.io/gc.ref.snapshot." + snapshotter: spec.Session,
		}),
	}
	copts = append(copts, r.withRuntime(spec))
	c, err := r.client.NewContainer(ctx, spec.Session, copts...)
	if err != nil {
		return runtime.Instance{}, err
	}

	clock.lap("container")

	key := "" // the shim calls LogBinary[0] with key and value of one query parameter
	if len(r.cfg.LogBinary) > 1 {
		key = r.cfg.LogBinary[1]
	}
	logger := cio.BinaryIO(r.cfg.LogBinary[0], map[string]string{key: spec.LogDir})
	// runc makes the network namespace inside the user namespace, so that
	// root in the container may bind port 80; it is connected before Start.
	task, err := c.NewTask(ctx, logger, ctd.WithRootFS(rootfs))
	if err != nil {
		return runtime.Instance{}, startError(err)
	}
	clock.lap("task")
	if err := pinNetns(task.Pid(), r.netnsPath(spec.Session)); err != nil {
		return runtime.Instance{}, err
	}
	if rec.IP, err = r.net.add(ctx, spec.Session, r.netnsPath(spec.Session)); err != nil {
		return runtime.Instance{}, err
	}
	clock.lap("network")
	hostname := spec.Hostname
	if hostname == "" {
		hostname = spec.Session
	}
	// In place: the container has this very inode mounted already.
	if err := os.WriteFile(files["/etc/hosts"], []byte(hostsFile(hostname, rec.IP)), 0o644); err != nil {
		return runtime.Instance{}, err
	}
	rec.StartedAt = time.Now().UTC()
	if err := r.saveRecord(rec); err != nil {
		return runtime.Instance{}, err
	}
	if err := hooks.AfterCreate(ctx); err != nil {
		return runtime.Instance{}, err
	}
	if err := task.Start(ctx); err != nil {
		return runtime.Instance{}, startError(err)
	}
	clock.lap("start")
	r.log.Debug("container started", "session", spec.Session, "took", clock)
	return runtime.Instance{
		Session: spec.Session, Generation: spec.Generation, ID: c.ID(), State: runtime.StateRunning,
		PID: int(task.Pid()), ImageDigest: rec.ImageDigest, Spec: spec, StartedAt: rec.StartedAt,
	}, nil
}

func (r *Runtime) withRuntime(spec runtime.Spec) ctd.NewContainerOpts {
	if r.cfg.RuntimeName != DefaultRuntimeName {
		return ctd.WithRuntime(r.cfg.RuntimeName, nil) // its options are not runc's
	}
	return ctd.WithRuntime(r.cfg.RuntimeName, &options.Options{IoUid: spec.IDBase, IoGid: spec.IDBase, Root: r.runcRoot()})
}

// startError tells a command that is not there from other failures: it cannot
// be started on any machine.
func startError(err error) error {
	if containsAny(err.Error(), "executable file not found", "exec: \"") && containsAny(err.Error(), "no such file or directory", "executable file not found", "permission denied", "is a directory") {
		return fmt.Errorf("%w: %w", runtime.ErrInvalidSpec, err)
	}
	return err
}

// rootfs prepares the snapshot and returns the mounts that make the
// container's root: the image's layers, idmapped, under a writable layer that
// is the snapshot's own or in spec.ScratchDir.
func (r *Runtime) rootfs(ctx context.Context, spec runtime.Spec, img ctd.Image) ([]mount.Mount, error) {
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: spec.IDBase, Size: runtime.IDMapSize}}
	sn := r.client.SnapshotService(snapshotter)
	if err := sn.Remove(ctx, spec.Session); err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("removing an old snapshot: %w", err)
	}
	// WithNewSnapshot falls back to a copy with other owners where the
	// snapshotter cannot map ids (containerd 1.x).
	c := containers.Container{ID: spec.Session, Snapshotter: snapshotter}
	if err := ctd.WithNewSnapshot(spec.Session, img, ctd.WithUserNSRemapperLabels(ids, ids))(ctx, r.client, &c); err != nil {
		return nil, fmt.Errorf("preparing the root file system: %w", err)
	}
	mounts, err := sn.Mounts(ctx, spec.Session)
	if err != nil || spec.ScratchDir == "" {
		return mounts, err
	}
	info, err := sn.Stat(ctx, spec.Session)
	if err != nil {
		return nil, err
	}
	upper, work, err := scratch(spec, info.Parent)
	if err != nil {
		return nil, fmt.Errorf("scratch folder: %w", err)
	}
	swapped := false
	for i := range mounts {
		for j, o := range mounts[i].Options {
			switch {
			case strings.HasPrefix(o, "upperdir="):
				mounts[i].Options[j], swapped = "upperdir="+upper, true
			case strings.HasPrefix(o, "workdir="):
				mounts[i].Options[j] = "workdir=" + work
			}
		}
	}
	if !swapped {
		return nil, fmt.Errorf("snapshotter %s gave no overlay mount for %s", snapshotter, spec.Image)
	}
	return mounts, nil
}

// scratch makes the writable layer's folders. One that belongs to other layers
// is emptied: an upper layer over a different lower one is undefined.
func scratch(spec runtime.Spec, parent string) (upper, work string, err error) {
	upper, work = filepath.Join(spec.ScratchDir, "upper"), filepath.Join(spec.ScratchDir, "work")
	marker := filepath.Join(spec.ScratchDir, "parent")
	want := fmt.Sprintf("%s %d\n", parent, spec.IDBase)
	have, err := os.ReadFile(marker)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", "", err
	}
	if string(have) != want {
		for _, d := range []string{upper, work, marker} {
			if err := os.RemoveAll(d); err != nil {
				return "", "", err
			}
		}
	}
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", "", err
		}
		// Without this the image's / would belong to nobody inside.
		if err := os.Lchown(d, int(spec.IDBase), int(spec.IDBase)); err != nil {
			return "", "", err
		}
	}
	if err := os.Chmod(upper, 0o755); err != nil {
		return "", "", err
	}
	if string(have) == want {
		return upper, work, nil
	}
	return upper, work, atomicfile.Write(marker, []byte(want), 0o600)
}

// inspect returns runtime.ErrNotFound when there is no whole container: none,
// one that was never started, or one whose shim is gone (after a reboot).
func (r *Runtime) inspect(ctx context.Context, session string) (runtime.Instance, record, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	missing := fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	if _, err := r.client.ContainerService().Get(ctx, session); err != nil {
		if errdefs.IsNotFound(err) {
			return runtime.Instance{}, record{}, missing
		}
		return runtime.Instance{}, record{}, err
	}
	rec, err := r.loadRecord(session)
	if errors.Is(err, fs.ErrNotExist) {
		return runtime.Instance{}, record{}, missing
	} else if err != nil {
		return runtime.Instance{}, record{}, err
	}
	task, err := r.task(ctx, session)
	if err != nil {
		return runtime.Instance{}, record{}, err
	}
	st, err := task.Status(ctx)
	if errdefs.IsNotFound(err) {
		return runtime.Instance{}, record{}, missing
	} else if err != nil {
		return runtime.Instance{}, record{}, err
	}
	inst := runtime.Instance{
		Session: session, Generation: rec.Spec.Generation, ID: session, ImageDigest: rec.ImageDigest,
		Spec: rec.Spec, StartedAt: rec.StartedAt,
	}
	switch st.Status {
	case ctd.Running:
		inst.State, inst.PID = runtime.StateRunning, int(task.Pid())
	case ctd.Paused, ctd.Pausing:
		inst.State, inst.PID = runtime.StatePaused, int(task.Pid())
	case ctd.Stopped:
		inst.State = runtime.StateExited
		exit := r.exit(session, int(st.ExitStatus), st.ExitTime)
		inst.Exit = &exit
	default:
		return runtime.Instance{}, record{}, missing
	}
	return inst, rec, nil
}

// exit decides whether the memory limit ended the container: the kernel killed
// in its cgroup, and the first process died by SIGKILL.
func (r *Runtime) exit(session string, code int, at time.Time) runtime.Exit {
	oom := code == 128+int(syscall.SIGKILL) && r.oomKills(session) > 0
	return runtime.Exit{Code: code, OOMKilled: oom, At: at}
}

// task returns runtime.ErrNotFound when there is none.
func (r *Runtime) task(ctx context.Context, session string) (ctd.Task, error) {
	c, err := r.client.LoadContainer(ctx, session)
	if err == nil {
		var t ctd.Task
		if t, err = c.Task(ctx, nil); err == nil {
			return t, nil
		}
	}
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("%w: session %s", runtime.ErrNotFound, session)
	}
	return nil, err
}
