package worker

import (
	"context"
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/nodeagent/checkpoint"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// detach stops the container of a session that is no longer this node's. What it
// has in object storage is another node's by now, so nothing of it is saved from here.
func (w *Worker) detach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	a := w.last
	if a == nil && w.cfg.Storage != nil { // of an earlier daemon that has left no assignment
		if err := w.cfg.Storage.DropSession(ctx, w.session); err != nil {
			return errors.Join(err, w.cfg.Runtime.Kill(ctx, w.session))
		}
	}
	if a.GetStorage() == nil {
		return w.cfg.Runtime.Stop(ctx, w.session, stopGrace)
	}
	if there, err := w.cfg.Volumes.Exists(VolumeName(a)); err != nil || !there {
		return errors.Join(err, w.cfg.Runtime.Stop(ctx, w.session, stopGrace))
	}
	vol, err := w.cfg.Volumes.Ensure(ctx, VolumeName(a), 0)
	if err != nil {
		return errors.Join(err, w.cfg.Runtime.Kill(ctx, w.session))
	}
	// The mount first: a container that is stopped in order writes once more.
	if err := w.cfg.Storage.Drop(ctx, vol); err != nil {
		return errors.Join(err, w.cfg.Runtime.Kill(ctx, w.session))
	}
	if err := w.cfg.Runtime.Kill(ctx, w.session); err != nil {
		return err
	}
	if w.cfg.Storage.Unsaved(vol) {
		w.log.Warn("changes of a session that went on elsewhere were never saved: its files are left here", "folder", vol.Dir)
		return nil
	}
	return w.cfg.Volumes.Remove(ctx, VolumeName(a))
}

// suspend saves and stops the session, reports that, and waits for the next
// assignment. With object storage nothing of it stays here.
func (w *Worker) suspend(ctx, actx context.Context, a *nodev1.Assignment) error {
	w.report(a, func(s *nodev1.SessionStatus) {
		s.State = nodev1.SessionStatus_SUSPENDING
		s.Progress = &cloudcodev1.StartProgress{Phase: "checkpoint", Detail: "saving the session"}
	})
	if err := w.finish(ctx, a, checkpoint.TriggerSuspend); err != nil {
		return err
	}
	w.report(a, func(s *nodev1.SessionStatus) { s.State = nodev1.SessionStatus_SUSPENDED })
	<-actx.Done()
	return nil
}

// remove stops the session and removes all that is here of it, reports that it is
// gone, and waits for the next assignment. What is in object storage stays.
func (w *Worker) remove(ctx, actx context.Context, a *nodev1.Assignment) error {
	if err := w.finish(ctx, a, checkpoint.TriggerStop); err != nil {
		return err
	}
	cctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	if err := w.cfg.Volumes.Remove(cctx, VolumeName(a)); err != nil {
		return err
	}
	if err := w.cfg.RemoveLogs(w.session); err != nil {
		return err
	}
	w.report(a, func(s *nodev1.SessionStatus) { s.State = nodev1.SessionStatus_GONE })
	<-actx.Done()
	return nil
}

// finish stops the container. A session with object storage is saved then, and
// let go of, and its volume removed. It can be called again after an error.
func (w *Worker) finish(ctx context.Context, a *nodev1.Assignment, trigger string) error {
	cctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	if err := w.cfg.Runtime.Stop(cctx, w.session, stopGrace); err != nil {
		return err
	}
	if a.GetStorage() == nil {
		return nil
	}
	if there, err := w.cfg.Volumes.Exists(VolumeName(a)); err != nil || !there {
		return err // finished before, or never begun
	}
	vol, err := w.cfg.Volumes.Ensure(cctx, VolumeName(a), 0)
	if err != nil {
		return err
	}
	deleting := a.GetDesiredState() == nodev1.Assignment_DELETE
	held, err := w.cfg.Storage.Holds(vol, a)
	switch {
	case err != nil:
		return err
	case !held, deleting && a.GetPurgeStorage():
		err = w.cfg.Storage.Drop(cctx, vol)
	default:
		err = w.save(ctx, a, vol, trigger, deleting)
	}
	if err != nil {
		return err
	}
	return w.cfg.Volumes.Remove(cctx, VolumeName(a))
}

func (w *Worker) save(ctx context.Context, a *nodev1.Assignment, vol volume.Volume, trigger string, deleted bool) error {
	p := w.storageParams(a, vol, false, func(string, string, int64, int64) {}, newStorageNews())
	p.Ending = true
	kept, err := w.cfg.Storage.Open(ctx, p)
	if err != nil {
		return err
	}
	w.setKept(kept)
	defer w.setKept(nil)
	err = kept.Finish(ctx, trigger, deleted)
	if err != nil {
		kept.Close()
		return err
	}
	// For the report that follows.
	w.mu.Lock()
	if w.status != nil {
		w.status = proto.CloneOf(w.status) // what was reported is being read
		w.status.Storage = kept.Status()
	}
	w.mu.Unlock()
	return nil
}
