package eventlog

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// typeGap is the type that a node gives to an event that stands for others that
// it missed itself.
const typeGap = "cloudcode.gap"

// typeCheckpointed is the type that a node gives to what is no event of OpenCode:
// its frame is a cloudcodev1.Checkpoint in JSON.
const typeCheckpointed = "cloudcode.checkpointed"

// feed collects the events of one session for all of its subscribers. One
// goroutine owns it: run.
type feed struct {
	*ring
	log         *Log
	id, uid     string
	subscribers int           // guarded by Log.mu
	ready       chan struct{} // closed when what was held is in the ring, or cannot be had now
	wake        chan struct{} // holds one: look at the inbox and at the subscribers

	inboxMu sync.Mutex
	inbox   []store.Change
	reload  bool // the inbox is not all: read the store

	// Used by run only.
	revision store.Revision // of what was read from the store
	puller   *puller        // nil: the session is on no node
	loading  *loading       // nil: it is over
	deleting bool           // the newest lifecycle event in the ring says so
}

// loading collects what both sources hold, until it can be merged.
type loading struct {
	deadline  <-chan time.Time
	lifecycle []*fleet.LifecycleEvent
	events    []*nodev1.RingEvent
	position  *nodev1.RingPosition // nil: the node has not answered yet
	last      uint64               // number of the node's newest event when it was first reached
}

func newFeed(l *Log, id, uid string) *feed {
	return &feed{
		ring: newRing(tagOf(uid), l.limit), log: l, id: id, uid: uid,
		ready: make(chan struct{}), wake: make(chan struct{}, 1), reload: true,
	}
}

func (f *feed) poke() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// offer gives the feed a change of its session.
func (f *feed) offer(c store.Change) {
	f.inboxMu.Lock()
	if f.inbox = append(f.inbox, c); len(f.inbox) > inboxMax {
		f.inbox, f.reload = nil, true
	}
	f.inboxMu.Unlock()
	f.poke()
}

func (f *feed) offerReload() {
	f.inboxMu.Lock()
	f.inbox, f.reload = nil, true
	f.inboxMu.Unlock()
	f.poke()
}

func (f *feed) takeInbox() (changes []store.Change, reload bool) {
	f.inboxMu.Lock()
	defer f.inboxMu.Unlock()
	changes, reload = f.inbox, f.reload
	f.inbox, f.reload = nil, false
	return changes, reload
}

// run collects until the session is deleted, nobody has listened for a while, or
// ctx ends.
func (f *feed) run(ctx context.Context) {
	defer f.follow(ctx, nil)
	deadline := time.NewTimer(loadWait)
	defer deadline.Stop()
	f.loading = &loading{deadline: deadline.C}
	idle := time.NewTimer(linger)
	idle.Stop()
	defer idle.Stop()
	waiting := false           // idle runs
	var retry <-chan time.Time // after the store could not be read
	f.poke()
	for {
		var pulled <-chan pulled
		if f.puller != nil {
			pulled = f.puller.out
		}
		var late <-chan time.Time
		if f.loading != nil {
			late = f.loading.deadline
		}
		select {
		case <-ctx.Done():
			f.fail(errStopping)
			return
		case <-f.wake:
			over, err := f.catchUp(ctx)
			if over {
				return
			}
			if err != nil && ctx.Err() == nil {
				f.log.log.ErrorContext(ctx, "cannot read a session's events; trying again", "session", f.id, "error", err)
				f.inboxMu.Lock()
				f.reload = true
				f.inboxMu.Unlock()
				retry = time.After(time.Second)
			}
			unused := f.log.idle(f)
			if unused && !waiting {
				idle.Reset(linger)
			} else if !unused {
				idle.Stop()
			}
			waiting = unused
		case <-retry:
			retry = nil
			f.poke()
		case p := <-pulled:
			f.take(p)
		case <-late:
			if f.session == nil { // the store cannot be read
				f.loading.deadline = time.After(loadWait)
				continue
			}
			f.update(func() { f.blind = true })
			f.finishLoading()
		case <-idle.C:
			waiting = false
			if f.log.drop(f) {
				f.fail(errStopping) // nobody listens
				return
			}
		}
	}
}

func (f *feed) fail(err error) { f.update(func() { f.err = err }) }

// catchUp takes over what has changed in the store; over says that the session
// is gone and its subscribers have been told.
func (f *feed) catchUp(ctx context.Context) (over bool, err error) {
	changes, reload := f.takeInbox()
	if reload {
		gone, err := f.readStore(ctx)
		if gone {
			f.end()
			return true, nil
		} else if err != nil {
			return false, err
		}
	}
	for _, c := range changes {
		switch {
		case c.Revision <= f.revision:
		case c.Kind == store.KindEvent:
			f.lifecycle([]*fleet.LifecycleEvent{c.Event})
		case c.Session == nil:
			f.end()
			return true, nil
		default:
			f.update(func() { f.session = c.Session })
		}
	}
	f.retarget(ctx)
	return false, nil
}

// readStore takes over from the store all that is not known yet.
func (f *feed) readStore(ctx context.Context) (gone bool, err error) {
	f.mu.Lock()
	after := f.at.lifecycle
	f.mu.Unlock()
	if f.loading != nil && len(f.loading.lifecycle) > 0 {
		after = f.loading.lifecycle[len(f.loading.lifecycle)-1].Sequence
	}
	var session *fleet.Session
	var events []*fleet.LifecycleEvent
	err = f.log.config.Store.View(ctx, func(tx store.ReadTx) (err error) {
		events = nil
		if session, err = tx.Session(f.id); err != nil {
			return err
		}
		for e, err := range tx.Events(f.uid, after) {
			if err != nil {
				return err
			}
			events = append(events, e)
		}
		f.revision = tx.Revision()
		return nil
	})
	if errors.Is(err, fleet.ErrNotFound) || (err == nil && session.UID != f.uid) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	f.update(func() { f.session = session })
	f.lifecycle(events)
	return false, nil
}

// lifecycle takes over events of the store, in order.
func (f *feed) lifecycle(events []*fleet.LifecycleEvent) {
	if f.loading != nil {
		f.loading.lifecycle = append(f.loading.lifecycle, events...)
		return
	}
	if len(events) == 0 {
		return
	}
	entries := make([]*entry, len(events))
	for i, e := range events {
		entries[i] = f.lifecycleEntry(e)
	}
	f.update(func() {
		for i, e := range events {
			f.pushLifecycle(entries[i], e)
		}
	})
}

func (f *feed) lifecycleEntry(e *fleet.LifecycleEvent) *entry {
	session := f.log.config.Session(e.Session)
	return &entry{
		kind: kindLifecycle, revision: e.Session.Revision, time: e.Time, size: proto.Size(session) + overhead,
		event: &cloudcodev1.SessionEvent{
			Time:  timestamppb.New(e.Time),
			Event: &cloudcodev1.SessionEvent_Lifecycle{Lifecycle: &cloudcodev1.LifecycleEvent{Session: session}},
		},
	}
}

// pushLifecycle holds the ring's lock.
func (f *feed) pushLifecycle(e *entry, of *fleet.LifecycleEvent) {
	if of.Sequence <= f.at.lifecycle {
		return
	}
	f.at.lifecycle = of.Sequence - 1 // a hole, if there is one, is before it
	at := f.at
	at.lifecycle = of.Sequence
	at.generation = max(at.generation, of.Session.Generation)
	f.deleting = of.Session.State == fleet.StateDeleting
	f.push(e, at)
}

func (f *feed) ringEntry(e *nodev1.RingEvent, old bool) *entry {
	out := &entry{kind: kindRing, time: e.GetTime().AsTime(), old: old, size: len(e.GetFrame()) + overhead}
	out.event = &cloudcodev1.SessionEvent{Time: e.GetTime()}
	if e.GetType() == typeGap {
		out.event.Event = gapEvent("The node lost its connection to OpenCode's event stream for a moment; what OpenCode said meanwhile is not known.")
		return out
	}
	if e.GetType() == typeCheckpointed {
		// A newer node may say more of it than is known here.
		checkpoint := &cloudcodev1.Checkpoint{}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(e.GetFrame(), checkpoint); err != nil {
			f.log.log.Error("a node's checkpointed event cannot be read", "session", f.id, "error", err)
		}
		out.event.Event = &cloudcodev1.SessionEvent_Checkpointed{Checkpointed: &cloudcodev1.CheckpointedEvent{Checkpoint: checkpoint}}
		return out
	}
	frame := string(e.GetFrame())
	if !utf8.ValidString(frame) { // cannot be sent otherwise
		frame = strings.ToValidUTF8(frame, "\uFFFD")
	}
	out.event.Event = &cloudcodev1.SessionEvent_Opencode{Opencode: &cloudcodev1.OpenCodeEvent{
		Type: e.GetType(), Directory: e.GetDirectory(), Frame: frame,
	}}
	return out
}

// pushRing holds the ring's lock.
func (f *feed) pushRing(e *entry, sequence uint64) {
	if sequence <= f.at.ring {
		return
	}
	f.at.ring = sequence - 1
	at := f.at
	at.ring = sequence
	f.push(e, at)
}

// take takes over what came from the node.
func (f *feed) take(p pulled) {
	l := f.loading
	switch {
	case p.err != nil: // it will be tried again
		if l != nil && l.position == nil {
			// A node that does not have the session yet holds nothing of it.
			f.update(func() { f.blind = status.Code(p.err) != codes.NotFound })
			f.finishLoading()
		}
	case p.position != nil && l != nil && l.position == nil:
		l.position, l.last = p.position, p.position.GetLast()
		if l.last < p.position.GetFirst() {
			f.finishLoading()
		}
	case p.position != nil:
		if l != nil {
			f.finishLoading() // what it has; the rest comes as it comes
		}
		f.moveTo(p.position)
	case l != nil:
		l.events = append(l.events, p.events...)
		if n := len(p.events); n > 0 && p.events[n-1].GetSequence() >= l.last {
			f.finishLoading()
		}
	case len(p.events) > 0:
		entries := make([]*entry, len(p.events))
		for i, e := range p.events {
			entries[i] = f.ringEntry(e, e.GetSequence() <= f.puller.old)
		}
		f.update(func() {
			for i, e := range p.events {
				f.pushRing(entries[i], e.GetSequence())
			}
		})
	}
}

// moveTo takes over where the node goes on.
func (f *feed) moveTo(p *nodev1.RingPosition) {
	before := p.GetFirst() - 1
	f.update(func() {
		f.at.generation = max(f.at.generation, uint64(p.GetGeneration()))
		f.newest = p.GetLast()
		switch {
		case !f.reached:
			f.reached, f.blind = true, false
			f.start, f.at.ring = before, max(f.at.ring, before)
			f.puller.old = p.GetLast()
		case before < f.at.ring && p.GetGap():
			// Numbers that began anew below the old ones, as after a clock was set
			// back: nothing that was held can be compared with what comes.
			f.ring.clear()
			f.start, f.at.ring = before, before
			f.epoch++
		default:
			f.at.ring = max(f.at.ring, before)
		}
	})
}

// finishLoading merges what both sources held by time, each in its own order.
func (f *feed) finishLoading() {
	l := f.loading
	f.loading = nil
	f.update(func() {
		if len(l.lifecycle) > 0 {
			f.at.lifecycle = l.lifecycle[0].Sequence - 1
		}
	})
	if l.position != nil {
		f.moveTo(l.position)
	}
	type merged struct {
		*entry
		lifecycle *fleet.LifecycleEvent
		sequence  uint64
	}
	all := make([]merged, 0, len(l.lifecycle)+len(l.events))
	i, k := 0, 0
	for i < len(l.lifecycle) || k < len(l.events) {
		if k == len(l.events) || (i < len(l.lifecycle) && !l.lifecycle[i].Time.After(l.events[k].GetTime().AsTime())) {
			all = append(all, merged{f.lifecycleEntry(l.lifecycle[i]), l.lifecycle[i], 0})
			i++
		} else {
			all = append(all, merged{f.ringEntry(l.events[k], true), nil, l.events[k].GetSequence()})
			k++
		}
	}
	f.update(func() {
		for _, m := range all {
			if m.lifecycle != nil {
				f.pushLifecycle(m.entry, m.lifecycle)
			} else {
				f.pushRing(m.entry, m.sequence)
			}
		}
	})
	close(f.ready)
}

// retarget follows the session to its node and generation.
func (f *feed) retarget(ctx context.Context) {
	f.mu.Lock()
	s := f.session
	f.mu.Unlock()
	var to *target
	if s != nil && s.Assignment != nil {
		to = &target{node: s.Assignment.Node, session: f.id, generation: s.Assignment.Generation}
	}
	if (to == nil) != (f.puller == nil) || (to != nil && *to != f.puller.target) {
		f.follow(ctx, to)
	}
	if to == nil && f.loading != nil && s != nil {
		f.finishLoading()
	}
}

// follow pulls from another place, or from none.
func (f *feed) follow(ctx context.Context, to *target) {
	var old uint64
	if f.puller != nil {
		old = f.puller.old
		f.puller.stop()
		f.puller = nil
	}
	if to == nil {
		return
	}
	f.mu.Lock()
	after := f.at.ring
	f.mu.Unlock()
	if l := f.loading; l != nil {
		// Read it all again: the numbers may be those of another node.
		l.position, l.events = nil, nil
	}
	f.puller = startPuller(ctx, f.log, *to, after)
	f.puller.old = old
}

// end tells subscribers that the session was deleted.
func (f *feed) end() {
	f.log.mu.Lock()
	f.log.forget(f)
	f.log.mu.Unlock()
	if f.loading != nil {
		f.finishLoading()
	}
	now := time.Now()
	f.mu.Lock()
	s, sequence := f.session, f.at.lifecycle+1
	f.mu.Unlock()
	var last *entry
	var of *fleet.LifecycleEvent
	if !f.deleting && s != nil {
		s = s.Clone()
		s.Revision++ // it has no record of its own any more
		s.Deleting, s.State, s.Reason, s.Message, s.Progress = true, fleet.StateDeleting, "", "", nil
		of = &fleet.LifecycleEvent{Sequence: sequence, Time: now, Session: s}
		last = f.lifecycleEntry(of)
	}
	f.update(func() {
		if last != nil {
			f.pushLifecycle(last, of)
		}
		f.push(&entry{kind: kindEnd, time: now, size: overhead, event: &cloudcodev1.SessionEvent{
			Time: timestamppb.New(now), Event: &cloudcodev1.SessionEvent_End{End: &cloudcodev1.EndEvent{Reason: "DELETED"}},
		}}, f.at)
	})
}

func gapEvent(message string) *cloudcodev1.SessionEvent_Gap {
	return &cloudcodev1.SessionEvent_Gap{Gap: &cloudcodev1.GapEvent{Message: message}}
}
