// Package eventlog gives subscribers what happens in a session, and replays what
// they missed.
//
//	l := eventlog.New(eventlog.Config{Store: db, Agents: agents, Session: toProto, Logger: log})
//	defer l.Close()                       // ends and waits for everything
//	l.Subscribe(ctx, sessionID, after)    // implements api.Events
//
// # Sources and order
//
// Two sources make one sequence: the lifecycle events that the store keeps, each
// with a number per session, and the events of the session's OpenCode, which its
// node keeps in a ring, each with a number too. There is one feed per session
// that anybody listens to. When it begins it reads what both sources hold and
// merges that by time; from then on events are in the order of their arrival at
// the feed. A feed lasts until 30 s after its last subscriber left. Each source's
// own order is always kept; two subscribers that are served by different feeds
// (before and after a restart of the server, say) may see a lifecycle event and
// an OpenCode event that came close together in different order.
//
// # Event ids
//
// An id is a full cursor, `generation-ring.lifecycle.tag`: the generation, the
// number of the last event of each source up to here, and a digest of the
// session's UID, because ids of sessions are used again. What a subscriber gets
// behind an id is every event with a higher number in either source, each once.
// This also holds where the order has changed: a cursor need not be one that the
// feed itself ever was at.
//
// # Gaps
//
// Numbers have no holes, so that a hole tells that something is missing: it was
// dropped by the store, the node or the feed before the subscriber read it. The
// subscriber then gets one gap event in its place, and goes on. The feed holds
// 4 MiB; a subscriber has a position in it and no queue of its own, so a slow one
// costs nothing and delays nobody.
//
// While the node cannot be reached a feed has lifecycle events only, and keeps
// trying. If that is so when somebody subscribes from now on, and the node comes
// back with events of before, they are left out by their time.
package eventlog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"sync"
	"time"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	ringBytes = 4 << 20
	overhead  = 128 // of an event besides its frame, about
	linger    = 30 * time.Second
	heartbeat = 10 * time.Second
	// loadWait is how long a new feed waits for what its node holds.
	loadWait  = 2 * time.Second
	inboxMax  = 1024 // changes that a feed has not looked at; beyond, it reads the store again
	readBatch = 128  // events that a subscriber takes out at a time
)

// Agents reaches node daemons.
type Agents interface {
	// Agent returns a client of the node daemon, or an error while it is not linked.
	Agent(ctx context.Context, nodeID string) (nodev1.AgentServiceClient, error)
}

// Config of a Log. All but Logger is needed.
type Config struct {
	Store  store.Store
	Agents Agents
	// Session returns the session as the API shows it.
	Session func(*fleet.Session) *cloudcodev1.Session
	Logger  *slog.Logger
}

// Log has a feed for each session that somebody listens to.
type Log struct {
	config Config
	log    *slog.Logger
	limit  int // bytes that a feed holds

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	closed bool
	feeds  map[string]*feed // by session id; the newest of that id
}

// New returns a Log that follows the store until Close.
func New(c Config) *Log {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Log{config: c, log: c.Logger, limit: ringBytes, feeds: map[string]*feed{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.follow)
	return l
}

// Close ends every subscription with fleet.ErrUnavailable, and waits until the
// feeds have ended.
func (l *Log) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.cancel()
	l.wg.Wait()
	return nil
}

// follow passes changes on to the feeds they concern. One watcher for all of
// them: a change wakes the feed of its session, and no other.
func (l *Log) follow() {
	for l.ctx.Err() == nil {
		err := l.followOnce()
		if l.ctx.Err() != nil || errors.Is(err, fleet.ErrUnavailable) {
			return
		}
		if errors.Is(err, fleet.ErrStale) {
			continue
		}
		l.log.ErrorContext(l.ctx, "cannot follow the store; trying again", "error", err)
		select {
		case <-time.After(time.Second):
		case <-l.ctx.Done():
		}
	}
}

func (l *Log) followOnce() error {
	var revision store.Revision
	if err := l.config.Store.View(l.ctx, func(tx store.ReadTx) error {
		revision = tx.Revision()
		return nil
	}); err != nil {
		return err
	}
	// Changes may have been missed since the last watch ended.
	l.mu.Lock()
	for _, f := range l.feeds {
		f.offerReload()
	}
	l.mu.Unlock()
	for change, err := range l.config.Store.Watch(l.ctx, revision) {
		if err != nil {
			return err
		}
		if change.Kind != store.KindSession && change.Kind != store.KindEvent {
			continue
		}
		l.mu.Lock()
		f := l.feeds[change.ID]
		l.mu.Unlock()
		if f != nil {
			f.offer(change)
		}
	}
	return l.ctx.Err()
}

// acquire returns the feed of a session, made if there is none, and the session
// as it is. Returns fleet.ErrNotFound if there is no such session. The caller
// releases the feed.
func (l *Log) acquire(ctx context.Context, id string) (*feed, *fleet.Session, error) {
	var session *fleet.Session
	if err := l.config.Store.View(ctx, func(tx store.ReadTx) (err error) {
		session, err = tx.Session(id)
		return err
	}); err != nil {
		return nil, nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, nil, errStopping
	}
	f := l.feeds[id]
	if f == nil || f.uid != session.UID {
		// One of an older session of this id ends by itself, as soon as it looks.
		if f != nil {
			f.offerReload()
		}
		f = newFeed(l, id, session.UID)
		l.feeds[id] = f
		l.wg.Go(func() { f.run(l.ctx) })
	}
	f.subscribers++
	return f, session, nil
}

var errStopping = fmt.Errorf("%w: the server is stopping", fleet.ErrUnavailable)

func (l *Log) release(f *feed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.subscribers--; f.subscribers == 0 {
		f.poke() // begins to count
	}
}

// drop takes a feed out that nobody listens to; false if somebody does again.
func (l *Log) drop(f *feed) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.subscribers > 0 {
		return false
	}
	l.forget(f)
	return true
}

// forget makes later subscribers get another feed. l.mu is held.
func (l *Log) forget(f *feed) {
	if l.feeds[f.id] == f {
		delete(l.feeds, f.id)
	}
}

func (l *Log) idle(f *feed) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return f.subscribers == 0
}

// Subscribe yields what happens in a session behind the event `after`, until ctx
// ends. Without `after`: from now on, beginning with a lifecycle event that holds
// the session as it is. The first event is a heartbeat, at once. After the
// session was deleted the last one is an end event. Events are shared: do not
// change them.
//
// An error is yielded once, last: fleet.ErrNotFound, fleet.ErrInvalidArgument for
// an `after` that is no event id, fleet.ErrUnavailable when the server stops.
func (l *Log) Subscribe(ctx context.Context, sessionID, after string) iter.Seq2[*cloudcodev1.SessionEvent, error] {
	return func(yield func(*cloudcodev1.SessionEvent, error) bool) {
		var at cursor
		var tag string
		if after != "" {
			var err error
			if at, tag, err = parseID(after); err != nil {
				yield(nil, err)
				return
			}
		}
		f, session, err := l.acquire(ctx, sessionID)
		if err != nil {
			yield(nil, err)
			return
		}
		defer l.release(f)
		s := &subscriber{feed: f, yield: yield, session: session, id: after, at: at, resumed: after != "", foreign: tag != f.tag}
		s.run(ctx)
	}
}
