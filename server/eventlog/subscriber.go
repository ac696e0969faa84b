package eventlog

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// clockSkew is how far a node's clock may be behind before new events count as old.
const clockSkew = 5 * time.Second

const lostMessage = "Events are missing here: they are no longer held."

// subscriber is one reader of a feed. It has a place in the feed's ring, and a
// cursor of what it has been given.
type subscriber struct {
	feed  *feed
	yield func(*cloudcodev1.SessionEvent, error) bool

	id      string // of the last event given, for heartbeats
	at      cursor
	next    uint64 // position in the ring
	epoch   int
	resumed bool      // began behind an event
	foreign bool      // that event is of another session that had this id
	since   time.Time // leave out events that the node held before; zero: none

	session *fleet.Session // as it was when this began
	shown   uint64         // its revision, if it was given
}

// run yields until ctx or the session ends, or the caller has enough.
func (s *subscriber) run(ctx context.Context) {
	if !s.beat() {
		return
	}
	subscribed := time.Now()
	select {
	case <-s.feed.ready:
	case <-ctx.Done():
		return
	case <-s.feed.log.ctx.Done():
		s.yield(nil, errStopping)
		return
	}
	if !s.begin(subscribed) {
		return
	}
	beat := time.NewTimer(heartbeat)
	defer beat.Stop()
	buf := make([]*entry, 0, readBatch)
	for {
		v := s.feed.read(s.next, buf)
		s.next = v.next
		if !s.enter(v) {
			return
		}
		for _, e := range v.entries {
			if ctx.Err() != nil || !s.pass(e) || e.kind == kindEnd {
				return
			}
		}
		if len(v.entries) > 0 {
			beat.Reset(heartbeat)
			clear(buf[:cap(buf)])
			continue
		}
		again, ok := s.settle(v)
		switch {
		case !ok:
			return
		case again:
			continue
		case v.err != nil:
			s.yield(nil, v.err)
			return
		}
		select {
		case <-v.changed:
		case <-beat.C:
			if !s.beat() {
				return
			}
			beat.Reset(heartbeat)
		case <-ctx.Done():
			return
		}
	}
}

// begin finds the place to start from.
func (s *subscriber) begin(subscribed time.Time) bool {
	v := s.feed.head()
	s.epoch = v.epoch
	switch {
	case s.resumed && s.foreign:
		s.at = cursor{}
		return s.gap("The events before were of another session that had this id.")
	case s.resumed:
		return true
	}
	s.at, s.next = v.at, v.next
	// The feed may be a moment behind what the caller has seen already, or the
	// other way round.
	session := s.session
	if v.session != nil && v.session.Revision > session.Revision {
		session = v.session
	}
	s.shown = session.Revision
	if v.blind {
		s.since = subscribed.Add(-clockSkew)
	}
	return s.give(&cloudcodev1.SessionEvent{
		Id: s.at.id(s.feed.tag), Time: timestamppb.Now(),
		Event: &cloudcodev1.SessionEvent_Lifecycle{Lifecycle: &cloudcodev1.LifecycleEvent{
			Session: s.feed.log.config.Session(session),
		}},
	})
}

// enter adapts the cursor to how the node's numbers began.
func (s *subscriber) enter(v view) bool {
	if v.epoch != s.epoch {
		s.epoch = v.epoch
		s.at.ring = v.start
		return s.gap(lostMessage)
	}
	if s.at.ring == 0 {
		s.at.ring = v.start
	}
	return true
}

// pass gives the event of an entry, unless it was given before.
func (s *subscriber) pass(e *entry) bool {
	switch {
	case e.kind == kindRing && e.at.ring <= s.at.ring, e.kind == kindLifecycle && e.at.lifecycle <= s.at.lifecycle:
		return true
	case s.at.behind(e.before):
		s.at = s.at.join(e.before)
		if !s.gap(lostMessage) {
			return false
		}
	}
	s.at.generation = max(s.at.generation, e.at.generation)
	switch e.kind {
	case kindRing:
		s.at.ring = e.at.ring
	case kindLifecycle:
		s.at.lifecycle = e.at.lifecycle
	}
	if e.kind == kindRing && e.old && e.time.Before(s.since) || e.kind == kindLifecycle && e.revision <= s.shown {
		return true
	}
	if s.at == e.at {
		return s.give(e.event)
	}
	// Its cursor is not one of the feed's, until the feed has overtaken it.
	return s.give(&cloudcodev1.SessionEvent{Id: s.at.id(s.feed.tag), Time: e.event.GetTime(), Event: e.event.GetEvent()})
}

// settle is called where nothing more is held: whoever is not where the feed is
// has missed something, or comes from elsewhere; again says to read once more.
func (s *subscriber) settle(v view) (again, ok bool) {
	unknownRing := v.reached && s.at.ring > v.newest
	unknownLifecycle := s.at.lifecycle > v.at.lifecycle
	if unknownRing || unknownLifecycle {
		// No event has that number (a store or a clock was set back): all that is
		// held may be new.
		if unknownRing {
			s.at.ring = 0
		}
		if unknownLifecycle {
			s.at.lifecycle = 0
		}
		s.next = 0
		return true, s.gap(lostMessage)
	}
	if s.at.behind(v.at) {
		s.at = s.at.join(v.at)
		return false, s.gap(lostMessage)
	}
	return false, true
}

func (s *subscriber) gap(message string) bool {
	return s.give(&cloudcodev1.SessionEvent{Id: s.at.id(s.feed.tag), Time: timestamppb.Now(), Event: gapEvent(message)})
}

func (s *subscriber) beat() bool {
	return s.give(&cloudcodev1.SessionEvent{
		Id: s.id, Time: timestamppb.Now(), Event: &cloudcodev1.SessionEvent_Heartbeat{Heartbeat: &cloudcodev1.HeartbeatEvent{}},
	})
}

func (s *subscriber) give(e *cloudcodev1.SessionEvent) bool {
	s.id = e.GetId()
	return s.yield(e, nil)
}
