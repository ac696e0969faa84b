package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// How often a session is saved. The promise is at most 2 s of chats and 5 s of
// files lost while a chat is busy; what is left of the 2 s is for the upload.
const (
	busyPeriod = time.Second
	// A frozen session does nothing: at most a tenth of its time.
	frozenShare = 10
	// Without a busy chat, what users do by hand is found by looking at the tree;
	// that takes at most a fiftieth of a CPU.
	idleShortest, idleLongest = 3 * time.Second, 30 * time.Second
	lookShare                 = 50

	saveTimeout   = 5 * time.Minute // of one save: a first one may be large
	slowAfter     = 8 * time.Second // a save that takes longer is said
	firstBackoff  = time.Second
	longBackoff   = 15 * time.Second
	verifyFirst   = 100 * time.Millisecond // after the start: that nobody has taken over
	verifyEvery   = 15 * time.Second       // later, without a mount
	verifyAgain   = time.Second            // while the object store does not answer
	retainEvery   = 5 * time.Minute
	retainTimeout = time.Minute
)

// Excluded says what of a session's tree is not saved, the bucket itself included
// where that is shown in it.
func Excluded(rel string, isDir bool) bool {
	return rel == BucketDir || excluded(rel, isDir)
}

func (s *Session) excluded() func(string, bool) bool {
	if s.mounter != nil && !s.mountMode() {
		return Excluded
	}
	return excluded // a folder of that name is the session's own
}

func excluded(rel string, isDir bool) bool {
	switch {
	case rel == ".opencode/data/opencode/log" && isDir:
		return true
	case strings.HasPrefix(rel, ".opencode/data/opencode/") && strings.HasSuffix(rel, ".db-shm"):
		return true // SQLite makes it anew, and must: it is of this machine's memory
	case path.Dir(rel) == ".opencode" && path.Base(rel) == "cache" && isDir:
		return true
	}
	return false
}

// writerState is where the writer keeps what it has sent already.
func (s *Session) writerState() string { return filepath.Join(s.p.Volume.StateDir, "writer") }

func (s *Session) openWriter(ctx context.Context) error {
	if s.writer != nil {
		return nil
	}
	if !s.acquired.Load() {
		if err := s.takeOver(ctx); err != nil {
			return err
		}
		if !s.acquired.Load() {
			return s.away
		}
	}
	options := checkpoint.WriterOptions{
		Dir: s.p.Volume.S3Dir, IDBase: s.p.Volume.IDBase, Owner: s.owner, StateDir: s.writerState(),
		Exclude: s.excluded(), Log: s.log,
	}
	w, err := s.repo.NewWriter(ctx, options)
	if errors.Is(err, checkpoint.ErrNotFound) {
		// Somebody has emptied the bucket. What is here is all that is left.
		s.log.Warn("the session's head is gone from the bucket: making it anew", "error", err)
		if err := os.RemoveAll(s.writerState()); err != nil {
			return err
		}
		if _, _, err = s.repo.Acquire(ctx, s.owner); err == nil {
			w, err = s.repo.NewWriter(ctx, options)
		}
	}
	if err != nil {
		return err
	}
	s.writer = w
	if s.restored == "" { // it stays in the head, whoever saves
		head, err := s.repo.Head(ctx)
		if err != nil {
			s.closeWriter()
			return err
		}
		s.restored = head.Restored
	}
	return nil
}

func (s *Session) closeWriter() {
	if s.writer == nil {
		return
	}
	if err := s.writer.Close(); err != nil {
		s.log.Warn("closing the writer of checkpoints", "error", err)
	}
	s.writer = nil
}

// save makes one checkpoint, and tells the status how that went.
func (s *Session) save(ctx context.Context, trigger string, freeze func(context.Context) (func() error, error)) (checkpoint.Info, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	// An object store that answers nothing is waited for longer than a person
	// should be left in the dark.
	slow := time.AfterFunc(slowAfter, func() {
		s.setStatus(func(st *cloudcodev1.StorageStatus) {
			if st.GetUnsavedSince() == nil {
				st.UnsavedSince = timestamppb.New(began)
				st.Message = "saving takes long: much has changed, or the object store is slow or away; the session goes on"
			}
		})
	})
	defer slow.Stop()
	info, err := func() (checkpoint.Info, error) {
		if err := s.openWriter(ctx); err != nil {
			return checkpoint.Info{}, err
		}
		record, err := s.record()
		if err != nil {
			return checkpoint.Info{}, err
		}
		s.mu.Lock()
		version := s.version
		s.mu.Unlock()
		return s.writer.Save(ctx, freeze, checkpoint.Meta{
			Trigger: trigger, OpenCodeVersion: version, SessionJSON: record,
			Mode: s.a.GetStorage().GetMode().String(), Restored: s.restored,
		})
	}()
	slow.Stop()
	if errors.Is(err, checkpoint.ErrNotFound) {
		s.closeWriter() // its head is gone; the next one makes it anew
	}
	if err != nil {
		if !errors.Is(context.Cause(ctx), context.Canceled) {
			s.setStatus(func(st *cloudcodev1.StorageStatus) {
				// Nothing of a session that is another's is waiting to be saved.
				if st.GetUnsavedSince() == nil && !errors.Is(err, ErrFenced) {
					s.markUnsaved()
					st.UnsavedSince = timestamppb.New(began)
				}
				st.Message = unsavedMessage(err)
			})
		}
		return info, err
	}
	s.setStatus(func(st *cloudcodev1.StorageStatus) {
		if info.ID != "" {
			st.Checkpoint = Proto(info)
		}
		if st.GetUnsavedSince() != nil {
			st.UnsavedSince, st.Message = nil, s.note
		}
	})
	if err := os.Remove(filepath.Join(s.p.Volume.StateDir, unsavedFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("it cannot be noted that all is saved", "error", err)
	}
	stats := s.writer.Stats()
	if info.Unchanged {
		s.look = stats.Total
	} else {
		s.log.Debug("session saved", "checkpoint", info.ID, "trigger", trigger, "files", info.Files, "bytes", info.Bytes,
			"sent", info.UploadedBytes, "frozen", stats.Frozen, "took", stats.Total)
	}
	return info, nil
}

func unsavedMessage(err error) string {
	advice := "the session goes on, and is saved as soon as that works"
	switch {
	case errors.Is(err, objstore.ErrDenied), errors.Is(err, objstore.ErrNoBucket), errors.Is(err, objstore.ErrRegion):
		advice = "the session goes on; mend the bucket or the session's keys"
	case errors.Is(err, checkpoint.ErrFenced):
		advice = "another node has the session"
	}
	return fmt.Sprintf("changes cannot be saved: %v; %s", err, advice)
}

// Run saves the session until ctx ends or another node has taken over: then it
// returns ErrFenced, and the container must go. What changed last is saved by Finish.
func (s *Session) Run(ctx context.Context) error {
	defer close(s.ended)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var watching sync.WaitGroup
	defer watching.Wait()
	// Beside the saves: one of them may take minutes.
	watching.Go(func() {
		if err := s.watchOwner(ctx); err != nil {
			cancel(err)
		}
	})
	err := s.keepSaving(ctx)
	if cause := context.Cause(ctx); errors.Is(cause, ErrFenced) {
		err = cause
	}
	cancel(nil)
	watching.Wait()
	if errors.Is(err, ErrFenced) {
		s.fenced(context.WithoutCancel(ctx))
	}
	return err
}

// watchOwner looks again and again whether the session is still this node's, and
// returns ErrFenced if it is not. While the object store does not answer it asks
// every second: what a mounter could not write meanwhile it writes as soon as it can.
func (s *Session) watchOwner(ctx context.Context) error {
	wait := verifyFirst
	for {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = s.verifyPeriod()
		if !s.acquired.Load() {
			continue // the head is of the generation before
		}
		vctx, cancel := context.WithTimeout(ctx, checkInterval)
		err := s.repo.Verify(vctx, s.owner)
		cancel()
		switch {
		case errors.Is(err, ErrFenced):
			return err
		case err != nil && !errors.Is(err, checkpoint.ErrNotFound):
			wait = verifyAgain
		}
	}
}

func (s *Session) verifyPeriod() time.Duration {
	if s.mountMode() {
		return checkInterval
	}
	return verifyEvery
}

func (s *Session) keepSaving(ctx context.Context) error {
	var (
		timer    = time.NewTimer(idleShortest)
		nextTry  time.Time // after a failure
		backoff  = firstBackoff
		turn     bool // a turn has ended that is not saved yet
		retained = time.Now()
	)
	defer timer.Stop()
	attempt := func(trigger string) (checkpoint.Info, error) {
		info, err := s.save(ctx, trigger, s.p.Freeze)
		switch {
		case err == nil:
			nextTry, backoff = time.Time{}, firstBackoff
			if turn && (trigger == TriggerTurn || info.Time.After(s.activity.turnTime())) {
				turn = false
				s.p.Checkpointed(Proto(info))
			}
		case ctx.Err() == nil:
			s.log.Warn("cannot save the session", "trigger", trigger, "error", err, "retry_in", backoff)
			nextTry = time.Now().Add(backoff)
			backoff = min(2*backoff, longBackoff)
		}
		return info, err
	}
	for {
		var err error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case r := <-s.requests:
			var info checkpoint.Info
			info, err = attempt(r.trigger)
			r.done <- result{info, err}
		case <-s.activity.start():
			// The next look was to be that of a session at rest.
		case <-s.activity.turn():
			turn = true
			if time.Now().Before(nextTry) {
				continue
			}
			_, err = attempt(TriggerTurn)
		case <-timer.C:
			trigger := TriggerChange
			switch {
			case turn:
				trigger = TriggerTurn
			case s.activity.busy():
				trigger = TriggerBusy
			}
			if !time.Now().Before(nextTry) {
				_, err = attempt(trigger)
			}
			if err == nil && time.Since(retained) > retainEvery {
				retained = time.Now()
				s.retain(ctx)
			}
		}
		if errors.Is(err, ErrFenced) {
			return err
		}
		timer.Reset(s.period())
	}
}

// period until the tree is looked at again.
func (s *Session) period() time.Duration {
	var st checkpoint.Stats
	if s.writer != nil {
		st = s.writer.Stats()
	}
	if s.activity.busy() {
		return max(busyPeriod-st.Total, frozenShare*st.Frozen)
	}
	return min(max(lookShare*s.look, idleShortest), idleLongest)
}

func (s *Session) retain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, retainTimeout)
	defer cancel()
	if deleted, err := s.repo.Retain(ctx, s.owner, checkpoint.DefaultPolicy); err != nil {
		s.log.Warn("cannot remove old checkpoints", "error", err)
	} else if len(deleted) > 0 {
		s.log.Debug("removed old checkpoints", "count", len(deleted))
	}
}

// errEnded: a save was asked for, and the session ends.
var errEnded = fmt.Errorf("%w: the session ends or starts again just now", objstore.ErrUnavailable)

// SaveNow makes a checkpoint by Run's loop, as soon as that runs. Returns
// objstore.ErrUnavailable if the loop ends first. Run is called once.
func (s *Session) SaveNow(ctx context.Context, trigger string) (*cloudcodev1.Checkpoint, error) {
	r := request{trigger: trigger, done: make(chan result, 1)}
	select {
	case s.requests <- r:
	case <-s.ended:
		return nil, errEnded
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case <-s.ended:
		return nil, errEnded
	case res := <-r.done:
		if res.err != nil {
			return nil, res.err
		}
		return Proto(res.info), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Finish saves what changed last, unmounts, and marks the session as let go of
// (and deleted, if it is), so that another node need not wait. The container has
// ended, and so has Run. On an error all is as it was, to be tried again.
func (s *Session) Finish(ctx context.Context, trigger string, deleted bool) error {
	if _, err := s.save(ctx, trigger, nil); err != nil {
		return fmt.Errorf("saving the session: %w", err)
	}
	if err := s.unmountBucket(ctx); err != nil {
		return fmt.Errorf("unmounting the bucket: %w", err)
	}
	if err := s.repo.Release(ctx, s.owner, deleted); err != nil {
		return fmt.Errorf("letting go of the session: %w", err)
	}
	s.Close()
	return nil
}

// Close lets go of what the session has in this process: its mount stays, for the
// next Open, here or in the next daemon.
func (s *Session) Close() {
	s.stopSupervising()
	s.closeWriter()
	s.closeStore()
}

// Abandon is Close that also drops the mount and what was not written by it.
func (s *Session) Abandon(ctx context.Context) error {
	err := s.abandonBucket(ctx)
	s.Close()
	return err
}
