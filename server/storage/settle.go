package storage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	settleParallel = 4
	settleFirst    = time.Second // after a failure, doubled each time …
	settleMax      = time.Minute // … up to this
	// markTries bounds how long a session is kept only to be marked as deleted in a
	// bucket that does not answer. If it cannot be, `recover` offers it again.
	markTries = 4

	deleteBatch = 1000
)

// settleAll sees to it that object storage knows of every session that was
// deleted: it is marked there as deleted, or purged. Nodes mark what they have
// themselves; this is for what is on none, and for purges.
func (s *Storage) settleAll(ctx context.Context) error {
	w := &settler{s: s, slots: make(chan struct{}, settleParallel), jobs: map[string]*settleJob{}}
	defer w.wg.Wait()
	pause := settleFirst
	for ctx.Err() == nil {
		revision, err := w.load(ctx)
		if err == nil {
			pause = settleFirst
			err = w.watch(ctx, revision)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, fleet.ErrUnavailable):
			return err
		case errors.Is(err, fleet.ErrStale): // fell behind: read everything again
			continue
		}
		s.log.ErrorContext(ctx, "cannot read which sessions are deleted; trying again", "error", err)
		sleep(ctx, pause, nil)
		pause = min(2*pause, settleMax)
	}
	return nil
}

// sleep returns early if ctx ends or somebody wakes it.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-wake:
	case <-ctx.Done():
	}
}

// settler has one job for each session that waits.
type settler struct {
	s     *Storage
	wg    sync.WaitGroup
	slots chan struct{}

	mu   sync.Mutex
	jobs map[string]*settleJob // by uid
}

type settleJob struct {
	purge bool
	wake  chan struct{} // holds one: what is asked for has changed
}

func (w *settler) load(ctx context.Context) (revision store.Revision, err error) {
	var waiting []*fleet.Session
	if err := w.s.config.Store.View(ctx, func(tx store.ReadTx) error {
		revision, waiting = tx.Revision(), nil
		for sess, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			if sess.AwaitsStorage() {
				waiting = append(waiting, sess)
			}
		}
		return nil
	}); err != nil {
		return 0, err
	}
	for _, sess := range waiting {
		w.offer(ctx, sess)
	}
	return revision, nil
}

func (w *settler) watch(ctx context.Context, after store.Revision) error {
	for change, err := range w.s.config.Store.Watch(ctx, after) {
		if err != nil {
			return err
		}
		if change.Kind == store.KindSession && change.Session != nil && change.Session.AwaitsStorage() {
			w.offer(ctx, change.Session)
		}
	}
	return ctx.Err()
}

func (w *settler) offer(ctx context.Context, sess *fleet.Session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if job := w.jobs[sess.UID]; job != nil {
		// Its own notes on why it cannot be done do not wake it.
		if job.purge != sess.Purge {
			job.purge = sess.Purge
			select {
			case job.wake <- struct{}{}:
			default:
			}
		}
		return
	}
	job := &settleJob{purge: sess.Purge, wake: make(chan struct{}, 1)}
	w.jobs[sess.UID] = job
	id, uid := sess.ID, sess.UID
	w.wg.Go(func() {
		w.run(ctx, job, id, uid)
		w.mu.Lock()
		delete(w.jobs, uid)
		w.mu.Unlock()
	})
}

// run settles one session, however often it has to be tried.
func (w *settler) run(ctx context.Context, job *settleJob, id, uid string) {
	pause := settleFirst
	for try := 1; ctx.Err() == nil; try++ {
		select {
		case w.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		done, err := w.s.settle(ctx, id, uid, try)
		<-w.slots
		if done || ctx.Err() != nil {
			return
		}
		if err != nil {
			w.s.log.WarnContext(ctx, "cannot settle a deleted session with its object storage; trying again", "session", id, "error", err, "pause", pause)
		}
		sleep(ctx, pause, job.wake)
		pause = min(2*pause, settleMax)
	}
}

// settle tries once. done says that there is nothing more to do.
func (s *Storage) settle(ctx context.Context, id, uid string, try int) (done bool, err error) {
	var sess *fleet.Session
	err = s.config.Store.View(ctx, func(tx store.ReadTx) (err error) {
		sess, err = tx.Session(id)
		return err
	})
	if errors.Is(err, fleet.ErrNotFound) || (err == nil && (sess.UID != uid || !sess.AwaitsStorage())) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	purge := sess.Purge
	if purge {
		err = s.purge(ctx, sess)
	} else {
		err = s.markDeleted(ctx, sess)
		if err != nil && try >= markTries && ctx.Err() == nil {
			s.log.WarnContext(ctx, "a deleted session could not be marked as deleted in its object storage: it is there as one that can be recovered",
				"session", id, "storage", sess.Spec.Storage.URI(), "error", err)
			err = nil
		}
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	_, storeErr := s.config.Store.Update(ctx, func(tx store.Tx) error {
		now, err2 := tx.Session(id)
		if errors.Is(err2, fleet.ErrNotFound) || (err2 == nil && (now.UID != uid || !now.AwaitsStorage())) {
			done = true
			return nil
		} else if err2 != nil {
			return err2
		}
		if now.Purge != purge {
			done = false // asked for something else meanwhile
			return nil
		}
		done = err == nil
		before := *now
		if now.StorageSettled = done; !done {
			reason := grpcerr.Reason(err)
			if reason == "" {
				reason = fleet.ReasonPurging
			}
			if err := now.SetState(fleet.StateDeleting, reason, notYet(purge, err)); err != nil {
				return err
			}
		}
		if now.Reason == before.Reason && now.Message == before.Message && !done {
			return nil
		}
		now.UpdateTime = time.Now().UTC()
		if err := tx.PutSession(now); err != nil {
			return err
		}
		if now.Reason == before.Reason {
			return nil
		}
		_, err := tx.AppendEvent(now)
		return err
	})
	return done && storeErr == nil, errors.Join(err, storeErr)
}

func notYet(purge bool, err error) string {
	text := status.Convert(err).Message()
	if purge {
		return fmt.Sprintf("Its object storage could not be emptied yet; that is tried again. Delete it once more without purging to leave there what there is. %s", text)
	}
	return fmt.Sprintf("It could not be marked as deleted in its object storage yet; that is tried again for some seconds. %s", text)
}

// last is who has a deleted session's head at its end: a generation behind all that
// nodes have been given, so that each of them is fenced, also one that cannot be
// reached or has not taken the session yet.
func last(sess *fleet.Session) checkpoint.Owner {
	return checkpoint.Owner{SessionID: sess.ID, SessionUID: sess.UID, Generation: sess.Generation + 1}
}

// markDeleted says in the session's head that it was deleted, if the head is its
// own. Most often its node has done so. A session of another server may have its uid:
// that is kept when it is recovered.
func (s *Storage) markDeleted(ctx context.Context, sess *fleet.Session) error {
	st, err := s.Session(sess.Spec.Storage)
	if err != nil {
		return err
	}
	ctx, cancel := bound(ctx, askBound)
	defer cancel()
	head, err := st.inner.Head(ctx)
	switch {
	case errors.Is(err, checkpoint.ErrNotFound):
		return nil
	case err != nil:
		return explain(ctx, st.config, err)
	case head.Owner.SessionUID != sess.UID, head.Owner.Generation > sess.Generation && head.Owner != last(sess):
		return nil
	case head.Released && !head.DeleteTime.IsZero():
		return nil
	}
	err = st.inner.Retire(ctx, last(sess), true)
	if errors.Is(err, checkpoint.ErrFenced) {
		return nil // another's, since we looked
	}
	return explain(ctx, st.config, err)
}

// purge takes the session's head, so that no node writes any more, and deletes its
// folder and then its checkpoints: until they are gone all of it can be found again,
// and the purge goes on.
func (s *Storage) purge(ctx context.Context, sess *fleet.Session) error {
	st, err := s.Session(sess.Spec.Storage)
	if err != nil {
		return err
	}
	if err := alone(ctx, st); err != nil {
		return words(st.config, err)
	}
	if err := st.inner.Retire(ctx, last(sess), false); errors.Is(err, checkpoint.ErrFenced) || errors.Is(err, checkpoint.ErrExists) {
		return grpcerr.New(codes.FailedPrecondition, ReasonTaken, "%s is another session's by now, or another server runs this one: it is not deleted. %s", st.config.URI(st.prefix), err)
	} else if err != nil {
		return words(st.config, err)
	}
	if err := deleteFolder(ctx, st.bucket.store, st.prefix); err != nil {
		return words(st.config, fmt.Errorf("delete the session's folder: %w", err))
	}
	if err := st.inner.Purge(ctx, last(sess)); err != nil {
		return words(st.config, fmt.Errorf("delete the session's checkpoints: %w", err))
	}
	s.gc.soon(st.config)
	return nil
}

// alone returns FAILED_PRECONDITION if there is something in the session's folder that
// is not its own, of sessions that this server may not know: files of another session,
// or the checkpoints of another root.
func alone(ctx context.Context, st *Session) error {
	refused := func(format string, args ...any) error {
		return grpcerr.New(codes.FailedPrecondition, ReasonPrefixInUse, "%s is not deleted: %s", st.config.URI(st.prefix), fmt.Sprintf(format, args...))
	}
	for other, err := range st.bucket.repo.Around(ctx, st.prefix) {
		switch {
		case err != nil:
			return err
		case other.Err != nil:
			return refused("a session in %s may have files in it, and its checkpoints cannot be read: %s", st.config.URI(other.Prefix), other.Err)
		case other.Manifest == nil || modeOf(other.Manifest.Mode) == fleet.ModeMount:
			return refused("session %q has files in %s. If nobody needs them, recover that session, and purge it first", other.Head.Owner.SessionID, st.config.URI(other.Prefix))
		}
	}
	for o, err := range st.bucket.store.List(ctx, folder(st.prefix), "", "") {
		if err != nil {
			return err
		}
		if root, ok := rootOf(o.Key); ok && root != "" {
			return refused("checkpoints of other sessions are kept in %s, which is inside it", st.config.URI(root))
		}
	}
	return nil
}

func folder(prefix string) string {
	if prefix == "" {
		return ""
	}
	return prefix + "/"
}

// rootOf returns below what folder sessions are kept, if the key is of what Cloud Code
// keeps of them there.
func rootOf(key string) (root string, ok bool) {
	if strings.HasPrefix(key, conf.StateDir+"/") {
		return "", true
	}
	root, _, ok = strings.Cut(key, "/"+conf.StateDir+"/v1/")
	return root, ok
}

// deleteFolder deletes all objects of a folder below the root, but what Cloud Code
// itself keeps there.
func deleteFolder(ctx context.Context, s objstore.Store, prefix string) error {
	var keys []string
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		err := s.Delete(ctx, keys...)
		keys = keys[:0]
		return err
	}
	for o, err := range s.List(ctx, folder(prefix), "", "") {
		if err != nil {
			return err
		}
		if _, ok := rootOf(o.Key); ok {
			continue
		}
		if keys = append(keys, o.Key); len(keys) == deleteBatch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}
