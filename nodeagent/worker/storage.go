package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/nodeagent/archive"
	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/ring"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

const (
	// storagePeriod is how often news of the storage are reported at most: while a
	// chat is busy there is a checkpoint every second.
	storagePeriod = 3 * time.Second
	thawTimeout   = 10 * time.Second
	fenceTimeout  = 15 * time.Second
)

// storageNews says that a session's storage has something to report; each channel
// holds one.
type storageNews struct{ any, urgent chan struct{} }

func newStorageNews() storageNews {
	return storageNews{make(chan struct{}, 1), make(chan struct{}, 1)}
}

func (n storageNews) put(urgent bool) {
	c := n.any
	if urgent {
		c = n.urgent
	}
	select {
	case c <- struct{}{}:
	default:
	}
}

func (w *Worker) storageParams(a *nodev1.Assignment, vol volume.Volume, adopt bool, progress func(phase, detail string, current, total int64), news storageNews) checkpoint.Params {
	return checkpoint.Params{
		Assignment: a, Volume: vol, Adopt: adopt, Progress: progress,
		Stop:   func(ctx context.Context) error { return w.cfg.Runtime.Stop(ctx, w.session, stopGrace) },
		Freeze: w.freeze,
		Labels: func() map[string]string {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.target.GetLabels()
		},
		Changed: news.put,
		Checkpointed: func(c *cloudcodev1.Checkpoint) {
			frame, err := protojson.Marshal(c)
			if err != nil {
				w.log.Error("an event of a checkpoint cannot be made", "error", err)
				return
			}
			w.events.Append(ring.Event{Generation: a.GetGeneration(), Time: time.Now(), Type: checkpoint.TypeCheckpointed, Frame: frame})
		},
	}
}

// freeze stops all of the container for a moment. What has no container, or one
// that has ended, needs no freezing.
func (w *Worker) freeze(ctx context.Context) (thaw func() error, err error) {
	if f, ok := w.cfg.Runtime.(runtime.Freezer); ok {
		thaw, err = f.Freeze(ctx, w.session)
		if errors.Is(err, runtime.ErrNotFound) {
			return func() error { return nil }, nil
		}
		return thaw, err
	}
	err = w.cfg.Runtime.Pause(ctx, w.session)
	if errors.Is(err, runtime.ErrNotFound) {
		return func() error { return nil }, nil
	}
	thaw = func() error {
		// Whatever has become of the save: nothing may stay frozen.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawTimeout)
		defer cancel()
		err := w.cfg.Runtime.Resume(ctx, w.session)
		if errors.Is(err, runtime.ErrNotFound) {
			return nil
		}
		return err
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("freezing the session: %w", err), thaw())
	}
	return thaw, nil
}

// fence ends the container of a session that another node has, so that nothing
// more of it is written: the order is what makes that true.
func (w *Worker) fence(ctx context.Context, kept *checkpoint.Session) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fenceTimeout)
	defer cancel()
	w.log.Warn("another node has the session: ending it here")
	var errs []error
	if err := w.cfg.Runtime.Pause(ctx, w.session); err != nil && !errors.Is(err, runtime.ErrNotFound) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, kept.Abandon(ctx), w.cfg.Runtime.Kill(ctx, w.session))...)
}

// reportStorage reports news of the storage until ctx ends: what is urgent at once,
// other news not too often.
func (w *Worker) reportStorage(ctx context.Context, a *nodev1.Assignment, news storageNews) {
	quiet := time.After(0)
	for waiting := false; ; {
		select {
		case <-news.urgent:
		case <-news.any:
			waiting = true
			continue
		case <-quiet:
			quiet = time.After(storagePeriod)
			if !waiting {
				continue
			}
		case <-ctx.Done():
			return
		}
		waiting = false
		w.mu.Lock()
		ready := w.status.GetState() == nodev1.SessionStatus_RUNNING && w.status.GetGeneration() == a.GetGeneration()
		w.mu.Unlock()
		if ready { // else it goes with what is reported next
			w.report(a, func(s *nodev1.SessionStatus) { w.keep(s) })
		}
	}
}

// keep repeats what was reported last. w.mu is held.
func (w *Worker) keep(s *nodev1.SessionStatus) {
	storage := s.GetStorage()
	s.Storage = nil
	proto.Merge(s, w.status)
	s.Storage = storage
}

func (w *Worker) setKept(s *checkpoint.Session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kept = s
}

// Checkpoint saves the session now. Returns runtime.ErrNotFound while it does not
// run, and errNoStorage if it has no object storage.
func (w *Worker) Checkpoint(ctx context.Context, trigger string) (*cloudcodev1.Checkpoint, error) {
	w.mu.Lock()
	kept, target, serving := w.kept, w.target, w.serving
	w.mu.Unlock()
	switch {
	case target != nil && target.GetStorage() == nil:
		return nil, ErrNoStorage
	case kept == nil || serving == nil:
		return nil, fmt.Errorf("session %s: %w", w.session, runtime.ErrNotFound)
	}
	return kept.SaveNow(ctx, trigger)
}

// ErrNoStorage: the session is on this node's disk alone.
var ErrNoStorage = errors.New("the session has no object storage")

// Stored says whether the session is in object storage and runs here.
func (w *Worker) Stored() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.kept != nil && w.serving != nil
}

// Serving says whether the session runs and answers.
func (w *Worker) Serving() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.serving != nil
}

// Files returns the session's files as they are on this node; the caller closes
// its Root. Returns runtime.ErrNotFound if there are none.
func (w *Worker) Files(ctx context.Context) (archive.Tree, error) {
	w.mu.Lock()
	a, kept := w.target, w.kept
	w.mu.Unlock()
	if a == nil || a.GetStorage() != nil && kept == nil { // they may be on their way here
		return archive.Tree{}, runtime.ErrNotFound
	}
	if there, err := w.cfg.Volumes.Exists(VolumeName(a)); err != nil || !there {
		return archive.Tree{}, errors.Join(err, fmt.Errorf("session %s has no files here: %w", w.session, runtime.ErrNotFound))
	}
	vol, err := w.cfg.Volumes.Ensure(ctx, VolumeName(a), 0)
	if err != nil {
		return archive.Tree{}, err
	}
	tree := archive.Tree{IDBase: vol.IDBase, Skip: checkpoint.Excluded}
	dir := vol.S3Dir
	if a.GetStorage().GetMode() == cloudcodev1.Storage_MOUNT {
		dir, tree.Loose = vol.RootDir, true
	}
	if tree.Root, err = os.OpenRoot(dir); err != nil {
		return archive.Tree{}, err
	}
	return tree, nil
}
