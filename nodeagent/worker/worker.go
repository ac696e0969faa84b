// Package worker drives one session to what is assigned: it prepares the
// session's folder, keeps its container running, watches its OpenCode, and
// reports.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/container"
	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/opencode"
	"github.com/cloudcode-dev/cloudcode/nodeagent/ring"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// Bounds of the waits.
const (
	readyTimeout = 90 * time.Second // from container start to OpenCode's first answer
	// listenTimeout bounds how long a ready OpenCode waits for its event stream.
	listenTimeout = 3 * time.Second
	stopGrace     = 10 * time.Second // SIGTERM to SIGKILL; OpenCode needs 0.1 s
	cleanTimeout  = time.Minute      // for one attempt to stop and remove
	firstBackoff  = time.Second
	longBackoff   = time.Minute
	// stableAfter is how long OpenCode must have run for its failures to be forgotten.
	stableAfter = 10 * time.Minute
	// failedAfter restarts in a row the session is called FAILED; it is still tried again.
	failedAfter = 5
	ringBytes   = 4 << 20
)

// Volumes gives each session its folder on the node.
type Volumes interface {
	// Exists says whether Ensure would find the folder rather than make it.
	Exists(name string) (bool, error)
	Ensure(ctx context.Context, name string, diskBytes int64) (volume.Volume, error)
	Remove(ctx context.Context, name string) error
}

// VolumeName is the session's folder: a later session with the same id must not
// find the files of an earlier one.
func VolumeName(a *nodev1.Assignment) string {
	return a.GetSessionId() + "-" + strings.ReplaceAll(a.GetSessionUid(), "-", "")[:8]
}

// Config of all workers of a node.
type Config struct {
	Runtime runtime.Runtime
	Volumes Volumes
	// Storage keeps sessions in object storage.
	Storage *checkpoint.Manager
	// LogDir returns the folder for a session's logs; RemoveLogs removes it.
	LogDir     func(session string) string
	RemoveLogs func(session string) error
	// Report takes the newest status of the session; it must not block.
	Report func(*nodev1.SessionStatus)
	Log    *slog.Logger
}

// Worker owns one session on this node. Its loop is the only one that touches
// the session's container. It is of one session for good: one that is made later
// under the same id gets its own, with events and generations that begin anew.
type Worker struct {
	cfg     Config
	session string
	uid     string  // of the session; empty when only its container is known
	before  *Worker // of an earlier session of this id: ends first; may be nil
	log     *slog.Logger
	events  *ring.Ring
	cancel  context.CancelFunc
	done    chan struct{}

	mu      sync.Mutex
	target  *nodev1.Assignment // nil: no longer this node's
	changed chan struct{}      // closed and replaced when target changes
	status  *nodev1.SessionStatus
	ended   bool                // Assign has no effect any more
	serving *nodev1.Assignment  // what the running container belongs to; nil while none runs
	kept    *checkpoint.Session // while the container runs; nil without object storage
	last    *nodev1.Assignment  // the newest that was not nil: whose files are here
}

// Start makes a worker for an assignment and runs it until Stop. adopt says that
// the session's container ran before this daemon did, so that its state is not
// reported as a new start. before, if not nil, is the worker of an earlier session
// of this id, or of a container of one: it was told to end, and does so first. It
// is the new worker's from here on.
func Start(cfg Config, a *nodev1.Assignment, adopt bool, before *Worker) *Worker {
	return start(cfg, a.GetSessionId(), a, adopt, before)
}

// Detach makes a worker that stops the container of a session that is not this
// node's, and ends.
func Detach(cfg Config, session string) *Worker { return start(cfg, session, nil, false, nil) }

func start(cfg Config, session string, a *nodev1.Assignment, adopt bool, before *Worker) *Worker {
	ctx, cancel := context.WithCancel(context.Background())
	w := &Worker{
		cfg: cfg, session: session, uid: a.GetSessionUid(), before: before, log: cfg.Log.With("session", session),
		events: ring.New(ringBytes, time.Now()), cancel: cancel, done: make(chan struct{}),
		target: a, changed: make(chan struct{}),
	}
	go func() {
		defer close(w.done)
		if w.before != nil {
			select {
			case <-w.before.Done():
			case <-ctx.Done():
				w.before.Stop()
			}
			w.before = nil
		}
		w.run(ctx, adopt)
	}()
	return w
}

// Assign tells the worker what is wanted now. nil: the session is no longer this
// node's; its container is stopped, its folder stays, and the worker ends. False
// means that it takes this no more: it has ended, or is of another session that
// had this id; then it must be told nil, and another worker started.
func (w *Worker) Assign(a *nodev1.Assignment) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended || a != nil && a.GetSessionUid() != w.uid {
		return false
	}
	if a != nil && w.target != nil && a.GetGeneration() < w.target.GetGeneration() {
		return true
	}
	if sameTask(w.target, a) {
		w.target = a
		return true
	}
	w.target = a
	close(w.changed)
	w.changed = make(chan struct{})
	return true
}

// sameTask says whether a worker has the same to do. That a session has a
// workspace by now, or has been restored, is no news to the worker that did it, and
// labels are read when they are needed.
func sameTask(a, b *nodev1.Assignment) bool {
	if a == nil || b == nil {
		return a == b
	}
	b = proto.CloneOf(b)
	b.HasWorkspace, b.Labels = a.GetHasWorkspace(), a.GetLabels()
	if b.GetRestoreCheckpoint() == "" && a.GetGeneration() == b.GetGeneration() {
		b.RestoreCheckpoint = a.GetRestoreCheckpoint()
	}
	return proto.Equal(a, b)
}

// endIfUnassigned makes the worker take nothing any more, unless it was assigned
// something meanwhile.
func (w *Worker) endIfUnassigned() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = w.target == nil
	return w.ended
}

// Done is closed when the worker has ended by itself.
func (w *Worker) Done() <-chan struct{} { return w.done }

// Stop ends the worker and waits for it. The container goes on running.
func (w *Worker) Stop() {
	w.cancel()
	<-w.done
}

// Events returns the session's events.
func (w *Worker) Events() *ring.Ring { return w.events }

// Assignment returns what is wanted, nil if the session is no longer this node's.
func (w *Worker) Assignment() *nodev1.Assignment {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.target
}

// Dial connects to a port inside the container, for a caller that knows the
// session at a generation. Returns runtime.ErrStaleGeneration if that is not the
// one that runs, and runtime.ErrNotFound while none does.
func (w *Worker) Dial(ctx context.Context, generation int64, port uint16) (net.Conn, error) {
	w.mu.Lock()
	serving := w.serving
	w.mu.Unlock()
	switch {
	case serving == nil:
		return nil, fmt.Errorf("session %s: %w", w.session, runtime.ErrNotFound)
	case serving.GetGeneration() != generation:
		return nil, fmt.Errorf("session %s is at generation %d, not %d: %w", w.session, serving.GetGeneration(), generation, runtime.ErrStaleGeneration)
	}
	return w.cfg.Runtime.Dial(ctx, w.session, port)
}

// Resend reports the newest status again, to a server that may not have it.
func (w *Worker) Resend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.status != nil {
		w.cfg.Report(w.status)
	}
}

func (w *Worker) current() (*nodev1.Assignment, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.target, w.changed
}

func (w *Worker) setServing(a *nodev1.Assignment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serving = a
}

// readyTime as it was reported last, nil if it is not known.
func (w *Worker) readyTime() *timestamppb.Timestamp {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.status.GetReadyTime()
}

// report sends a status for an assignment, keeping what set leaves alone.
func (w *Worker) report(a *nodev1.Assignment, set func(*nodev1.SessionStatus)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	next := &nodev1.SessionStatus{SessionId: w.session, SessionUid: a.GetSessionUid(), Generation: a.GetGeneration()}
	if old := w.status; old != nil && old.GetGeneration() == a.GetGeneration() {
		next.RestartCount, next.OpencodeVersion, next.ReadyTime = old.GetRestartCount(), old.GetOpencodeVersion(), old.GetReadyTime()
		next.Storage = old.GetStorage()
	}
	if w.kept != nil {
		next.Storage = w.kept.Status()
	}
	set(next)
	// Errors may quote anything; what is no UTF-8 could not be sent, and would hold
	// up the reports of all sessions.
	next.Message = strings.ToValidUTF8(next.GetMessage(), "\uFFFD")
	w.status = next
	w.cfg.Report(next)
}

// run drives the session until ctx ends or it is no longer this node's.
func (w *Worker) run(ctx context.Context, adopt bool) {
	failures := 0                 // in a row
	var served *nodev1.Assignment // ran until it was replaced; nil after anything else
	for ctx.Err() == nil {
		a, changed := w.current()
		if a != nil {
			w.last = a
		}
		adopt = adopt || served != nil && sameContainer(served, a)
		served = nil
		// Whatever ends with the assignment has this context.
		actx, cancel := context.WithCancelCause(ctx)
		stop := make(chan struct{})
		var watch sync.WaitGroup
		watch.Go(func() {
			select {
			case <-changed:
				cancel(errReassigned)
			case <-stop:
			}
		})
		var err error
		switch {
		case a == nil:
			err = w.detach(ctx)
		case a.GetDesiredState() == nodev1.Assignment_DELETE:
			err = w.remove(ctx, actx, a)
		case a.GetDesiredState() == nodev1.Assignment_SUSPEND:
			err = w.suspend(ctx, actx, a)
		default:
			var ran time.Duration
			ran, err = w.keepRunning(actx, a, adopt, failures)
			if ran >= stableAfter {
				failures = 0
			}
			if ran > 0 && err == nil {
				served = a
			}
			adopt = false
		}
		if err != nil && context.Cause(actx) == nil { // neither reassigned nor told to end
			failures++
			w.failed(a, err, failures)
			again := time.After(backoff(failures, err))
			if errors.Is(err, checkpoint.ErrFenced) {
				again = nil // never by itself: the session runs elsewhere
			}
			select {
			case <-again:
			case <-actx.Done():
			}
		}
		if errors.Is(context.Cause(actx), errReassigned) {
			failures = 0
		}
		close(stop)
		watch.Wait()
		cancel(nil)
		if a == nil && err == nil && w.endIfUnassigned() {
			return
		}
	}
}

var errReassigned = errors.New("assignment changed")

// sameContainer says whether the container that runs for one assignment becomes
// that of another in place: nobody is to be told that it starts.
func sameContainer(a, b *nodev1.Assignment) bool {
	if b == nil || b.GetDesiredState() != nodev1.Assignment_RUN || a.GetOpencodePassword() != b.GetOpencodePassword() ||
		b.GetRestoreCheckpoint() != "" || !samePlace(a.GetStorage(), b.GetStorage()) {
		return false
	}
	bare := func(a *nodev1.Assignment) *cloudcodev1.SessionSpec {
		s := proto.CloneOf(a.GetSpec())
		s.NodeSelector, s.Storage = nil, nil
		s.Resources = &cloudcodev1.Resources{DiskBytes: s.GetResources().GetDiskBytes()}
		return s
	}
	return proto.Equal(bare(a), bare(b))
}

// samePlace says whether two are the same folder of a bucket in the same mode;
// other keys to it need no other container.
func samePlace(a, b *nodev1.AssignedStorage) bool {
	return a.GetMode() == b.GetMode() && a.GetEndpoint() == b.GetEndpoint() && a.GetBucket() == b.GetBucket() &&
		a.GetRoot() == b.GetRoot() && a.GetPrefix() == b.GetPrefix()
}

// backoff before try number failures+1.
func backoff(failures int, err error) time.Duration {
	if errors.Is(err, runtime.ErrInvalidSpec) || errors.Is(err, runtime.ErrImageNotFound) {
		return longBackoff / 4 // cannot help until somebody has done something; be there soon after
	}
	return min(firstBackoff<<min(failures-1, 10), longBackoff)
}

// keepRunning starts the container, or adopts it, and waits for its end. It
// returns nil only when actx has ended.
func (w *Worker) keepRunning(actx context.Context, a *nodev1.Assignment, adopt bool, failures int) (ran time.Duration, err error) {
	starting := func(phase, detail string, current, total int64) {
		w.report(a, func(s *nodev1.SessionStatus) {
			s.State = nodev1.SessionStatus_STARTING
			s.Progress = &cloudcodev1.StartProgress{Phase: phase, Detail: detail, CurrentBytes: current, TotalBytes: total}
			s.RestartCount += boolInt(failures > 0 && phase == "placed")
			s.ReadyTime = nil
		})
	}
	if !adopt {
		starting("placed", "on this node", 0, 0)
	}
	if there, err := w.cfg.Volumes.Exists(VolumeName(a)); err != nil {
		return 0, err
	} else if !there && a.GetHasWorkspace() && a.GetStorage() == nil {
		return 0, errNoWorkspace
	}
	vol, err := w.cfg.Volumes.Ensure(actx, VolumeName(a), a.GetSpec().GetResources().GetDiskBytes())
	if err != nil {
		return 0, err
	}
	hooks := &runtime.Hooks{Progress: func(p runtime.Progress) { starting(string(p.Phase), p.Detail, p.Current, p.Total) }}
	mounts := []runtime.Mount{{Source: vol.S3Dir, Destination: container.StorageDir, Propagated: true}}
	var kept *checkpoint.Session
	news := newStorageNews()
	if a.GetStorage() != nil {
		if kept, err = w.cfg.Storage.Open(actx, w.storageParams(a, vol, adopt, starting, news)); err != nil {
			return 0, err
		}
		defer kept.Close()
		w.setKept(kept)
		defer w.setKept(nil)
		mounts, hooks.Creating, hooks.Created = kept.Mounts(), kept.Detach, kept.Attach
	}
	spec := w.spec(a, vol, mounts)
	inst, err := w.cfg.Runtime.Ensure(actx, spec, hooks)
	if err != nil {
		return 0, err
	}
	// From here on the container's end is watched, also while it gets ready.
	exited := make(chan runtime.Exit, 1)
	waitFailed := make(chan error, 1)
	var watch sync.WaitGroup
	defer watch.Wait()
	wctx, cancel := context.WithCancel(actx)
	defer cancel()
	watch.Go(func() {
		exit, err := w.cfg.Runtime.Wait(wctx, w.session)
		if err != nil {
			waitFailed <- err
		} else {
			exited <- exit
		}
		cancel()
	})
	fenced := make(chan error, 1)
	if kept != nil {
		watch.Go(func() {
			if err := kept.Run(wctx); errors.Is(err, checkpoint.ErrFenced) {
				fenced <- errors.Join(err, w.fence(actx, kept))
				cancel()
			}
		})
		watch.Go(func() { w.reportStorage(wctx, a, news) })
	}
	ended := func() error {
		select {
		case err := <-fenced:
			return err
		case exit := <-exited:
			return &exitError{exit: exit, limit: spec.Resources.MemoryBytes}
		case err := <-waitFailed:
			if actx.Err() != nil {
				return nil
			}
			return err
		}
	}

	oc := opencode.NewClient(func(ctx context.Context) (net.Conn, error) {
		return w.cfg.Runtime.Dial(ctx, w.session, container.OpenCodePort)
	}, a.GetOpencodePassword())
	defer oc.Close()
	if !adopt {
		starting("opencode", "waiting for OpenCode to answer", 0, 0)
	}
	rctx, cancelReady := context.WithTimeout(wctx, readyTimeout)
	version, err := oc.WaitReady(rctx)
	cancelReady()
	if err != nil {
		if wctx.Err() != nil {
			watch.Wait()
			return 0, ended()
		}
		// Not stopped by the next Ensure, which would find it as wanted.
		return 0, errors.Join(fmt.Errorf("%w within %v: %w", errNotReady, readyTimeout, err), w.cfg.Runtime.Kill(actx, w.session))
	}
	// Nothing is let in before its events are listened to. An OpenCode whose event
	// stream does not work is let in all the same, a little later.
	listening := make(chan struct{})
	if kept != nil {
		kept.SetVersion(version)
	}
	watch.Go(func() { w.watchEvents(wctx, a, oc, kept, sync.OnceFunc(func() { close(listening) })) })
	select {
	case <-listening:
	case <-time.After(listenTimeout):
	case <-wctx.Done():
		watch.Wait()
		return 0, ended()
	}
	ready := time.Now()
	w.setServing(a)
	defer w.setServing(nil)
	readyTime := timestamppb.New(ready)
	if since := w.readyTime(); adopt && since != nil {
		readyTime = since
	} else if adopt && !inst.StartedAt.IsZero() {
		readyTime = timestamppb.New(inst.StartedAt)
	}
	w.report(a, func(s *nodev1.SessionStatus) {
		s.State, s.OpencodeVersion = nodev1.SessionStatus_RUNNING, version
		if s.ReadyTime == nil {
			s.ReadyTime = readyTime
		}
	})
	w.log.Info("session runs", "generation", a.GetGeneration(), "container", inst.ID, "opencode", version, "adopted", adopt)
	watch.Wait()
	return time.Since(ready), ended()
}

func boolInt(b bool) int32 {
	if b {
		return 1
	}
	return 0
}

// spec of the session's container.
func (w *Worker) spec(a *nodev1.Assignment, vol volume.Volume, mounts []runtime.Mount) runtime.Spec {
	s := a.GetSpec()
	env := maps.Clone(s.GetEnv())
	if env == nil {
		env = map[string]string{}
	}
	env[container.EnvPassword] = a.GetOpencodePassword()
	if s.GetOpencodeConfig() != "" {
		env[container.EnvConfig] = s.GetOpencodeConfig()
	}
	workingDir := ""
	if a.GetStorage().GetMode() == cloudcodev1.Storage_MOUNT {
		// The runtime enters the working folder before the bucket is attached. The
		// entrypoint enters the project's folder itself.
		workingDir = "/"
	}
	return runtime.Spec{
		WorkingDir: workingDir, Session: w.session, Generation: uint64(a.GetGeneration()), Image: s.GetImage(), Env: env,
		Resources: runtime.Resources{
			CPUMillis:   s.GetResources().GetCpuMillis(),
			MemoryBytes: s.GetResources().GetMemoryBytes(),
			PIDs:        s.GetResources().GetPids(),
		},
		Mounts:     mounts,
		IDBase:     vol.IDBase,
		ScratchDir: vol.ScratchDir,
		LogDir:     w.cfg.LogDir(w.session),
	}
}

// watchEvents reads OpenCode's event stream into the ring until ctx ends.
// listening is called each time the stream stands.
func (w *Worker) watchEvents(ctx context.Context, a *nodev1.Assignment, oc *opencode.Client, kept *checkpoint.Session, listening func()) {
	const first, longest = 50 * time.Millisecond, 5 * time.Second
	wait := first
	var lostSince time.Time // zero while connected
	unresponsive := false
	for seen := false; ctx.Err() == nil; {
		err := oc.Watch(ctx, func() {
			if seen {
				// What happened between two streams is not known: say so.
				w.events.Append(ring.Event{Generation: a.GetGeneration(), Time: time.Now(), Type: ring.TypeGap})
			}
			if unresponsive {
				unresponsive = false
				w.report(a, func(s *nodev1.SessionStatus) { s.State = nodev1.SessionStatus_RUNNING })
			}
			seen, wait, lostSince = true, first, time.Time{}
			if kept != nil {
				kept.Listening()
			}
			listening()
		}, func(e opencode.Event) {
			if kept != nil {
				defer kept.Event(e) // behind the event itself: what it says is saved follows it
			}
			w.events.Append(ring.Event{Generation: a.GetGeneration(), Time: time.Now(), Type: e.Type, Directory: e.Directory, Frame: e.Frame})
		})
		if ctx.Err() != nil {
			return
		}
		if lostSince.IsZero() {
			lostSince = time.Now()
		}
		w.log.Debug("event stream ended", "error", err)
		if !unresponsive && time.Since(lostSince) > time.Minute {
			unresponsive = true
			w.report(a, func(s *nodev1.SessionStatus) {
				s.State, s.Reason = nodev1.SessionStatus_RUNNING, ReasonUnresponsive
				s.Message = fmt.Sprintf("OpenCode's event stream has not answered since %s (%v); its process still runs: look at the session's logs, or delete and create it", lostSince.Format(time.TimeOnly), err)
			})
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, longest)
	}
}
