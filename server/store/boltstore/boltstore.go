// Package boltstore keeps the fleet's state in one bbolt file. Buckets:
//
//	meta
//	  schema        decimal number: the version of this layout
//	  revision      uint64: transactions that changed something, so far
//	sessions
//	  {id}          fleet.Session as JSON
//	nodes
//	  {id}          fleet.Node as JSON
//	events
//	  {session UID} a bucket; its sequence is that of the newest event
//	    {uint64}    fleet.LifecycleEvent as JSON, by sequence number
//	requests
//	  {key}         store.Request as JSON
//	request_times
//	  {uint64}{key} empty; Unix seconds, so that the oldest come first
//
// Numbers are big-endian.
package boltstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	// schema is the version of the layout above. A newer one is refused: this
	// program would write what that one does not expect.
	schema = 1

	lockTimeout = 3 * time.Second // a server that is just stopping may still hold the file
	maxBatch    = 64              // transactions that share one fsync

	// mapped is address space, not memory: bbolt maps anew when the file outgrows
	// it, and a writer then waits for all readers.
	mapped = 1 << 30
)

var (
	bucketMeta         = []byte("meta")
	bucketSessions     = []byte("sessions")
	bucketNodes        = []byte("nodes")
	bucketEvents       = []byte("events")
	bucketRequests     = []byte("requests")
	bucketRequestTimes = []byte("request_times")

	keySchema   = []byte("schema")
	keyRevision = []byte("revision")
)

// Store is a store.Store in a bbolt file.
type Store struct {
	db   *bbolt.DB
	feed *feed

	calls   chan *call
	closing chan struct{}
	done    chan struct{} // the committer has ended
	closed  atomic.Bool
}

var _ store.Store = (*Store)(nil)

// Open opens the file or makes it, with mode 0600. Fails within seconds if
// another process has it open.
func Open(path string) (*Store, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType, InitialMmapSize: mapped,
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%w: another cloudcode server uses this data directory (%s is locked): stop it, or give this one a --data-dir of its own", fleet.ErrUnavailable, path)
	} else if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, classify(err))
	}
	revision, err := initialize(db)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, classify(err)), db.Close())
	}
	s := &Store{
		db: db, feed: newFeed(revision),
		calls: make(chan *call), closing: make(chan struct{}), done: make(chan struct{}),
	}
	go s.commit()
	return s, nil
}

func initialize(db *bbolt.DB) (revision store.Revision, err error) {
	// Look before writing: an opened file of a newer version stays as it was.
	err = db.View(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if meta == nil {
			return nil
		}
		text := string(meta.Get(keySchema))
		version, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("schema version %q is not a number: is this a file of cloudcode's?", text)
		}
		if version > schema {
			return fmt.Errorf("%w: it was written by a newer cloudcode (schema %d, this one knows %d): use that version, or restore a backup", fleet.ErrFailedPrecondition, version, schema)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return revision, db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketSessions, bucketNodes, bucketEvents, bucketRequests, bucketRequestTimes} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		revision = store.Revision(number(meta.Get(keyRevision)))
		return meta.Put(keySchema, []byte(strconv.Itoa(schema)))
	})
}

// Close waits for transactions that run, ends watchers, and closes the file.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	close(s.closing)
	<-s.done
	s.feed.close()
	return s.db.Close()
}

// View implements store.Store.
func (s *Store) View(ctx context.Context, fn func(store.ReadTx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	tx, err := s.db.Begin(false)
	if err != nil {
		return closedOr(err)
	}
	defer tx.Rollback() //nolint:errcheck // ends a read
	return fn(newTx(tx))
}

// call is one Update that waits for its commit.
type call struct {
	fn       func(store.Tx) error
	taken    atomic.Bool // set once: by the committer that runs it, or by the caller that gives up
	done     chan struct{}
	revision store.Revision
	err      error
	panicked any

	changes []sized
}

// Update implements store.Store. Updates that wait at the same time share one
// write to disk; a lone one is written at once.
func (s *Store) Update(ctx context.Context, fn func(store.Tx) error) (store.Revision, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	c := &call{fn: fn, done: make(chan struct{})}
	select {
	case s.calls <- c:
	case <-s.closing:
		return 0, closedOr(bolterrors.ErrDatabaseNotOpen)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		// Once it runs it may be on disk: only its end tells.
		if c.taken.CompareAndSwap(false, true) {
			return 0, ctx.Err()
		}
		<-c.done
	}
	if c.panicked != nil {
		panic(c.panicked)
	}
	return c.revision, c.err
}

// commit is the only writer: it takes whatever waits, and writes it in one
// bbolt transaction.
func (s *Store) commit() {
	defer close(s.done)
	for {
		select {
		case <-s.closing:
			return
		case c := <-s.calls:
			s.runBatch(s.gather(c))
		}
	}
}

func (s *Store) gather(first *call) []*call {
	batch := []*call{first}
	for len(batch) < maxBatch {
		select {
		case c := <-s.calls:
			batch = append(batch, c)
		default:
			return batch
		}
	}
	return batch
}

func (s *Store) runBatch(batch []*call) {
	waiting := batch[:0]
	for _, c := range batch {
		if c.taken.CompareAndSwap(false, true) {
			waiting = append(waiting, c)
		}
	}
	for len(waiting) > 0 {
		failed, err := s.try(waiting)
		if failed < 0 {
			for _, c := range waiting {
				if err != nil {
					c.revision, c.err = 0, err
				}
				close(c.done)
			}
			return
		}
		// It wrote before it failed, and bbolt has no savepoints: it is out, and the
		// others run again.
		close(waiting[failed].done)
		waiting = append(waiting[:failed:failed], waiting[failed+1:]...)
	}
}

// try runs calls in one transaction and commits it. Returns the index of a call
// that must be left out, or -1 and the error that all of them share.
func (s *Store) try(calls []*call) (failed int, _ error) {
	btx, err := s.db.Begin(true)
	if err != nil {
		return -1, classify(err)
	}
	defer btx.Rollback() //nolint:errcheck // after a commit there is nothing left to roll back
	last := s.feed.revision()
	next := last
	for i, c := range calls {
		tx := newTx(btx)
		tx.rev, tx.next = next, next+1
		c.changes, c.revision, c.err = nil, 0, nil
		c.run(tx)
		if c.err != nil || c.panicked != nil {
			if tx.wrote {
				return i, nil
			}
			continue
		}
		c.revision = next
		if tx.wrote {
			next++
			c.revision, c.changes = next, tx.changes
		}
	}
	if next == last {
		return -1, nil // nobody wrote
	}
	if err := btx.Bucket(bucketMeta).Put(keyRevision, bigEndian(uint64(next))); err != nil {
		return -1, classify(err)
	}
	if err := btx.Commit(); err != nil {
		return -1, fmt.Errorf("write to the state file: %w", classify(err))
	}
	var changes []sized
	for _, c := range calls {
		changes = append(changes, c.changes...)
	}
	s.feed.publish(next, changes)
	return -1, nil
}

// run calls fn; a panic belongs to the caller's goroutine, not to this one.
func (c *call) run(tx *tx) {
	defer func() {
		if p := recover(); p != nil {
			c.panicked = p
		}
	}()
	c.err = c.fn(tx)
}

// classify finds the class of a bbolt error. bbolt formats some errors of the
// file system without wrapping them.
func classify(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		return fmt.Errorf("%w: the server's disk is full: make room below its data directory (%w)", fleet.ErrResourceExhausted, err)
	}
	return closedOr(err)
}

func closedOr(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return fmt.Errorf("%w: the server is stopping", fleet.ErrUnavailable)
	}
	return err
}
