package checkpoint

import (
	"sync"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/opencode"
)

// unknownFor is how long a session counts as busy after OpenCode's events were
// not listened to: a chat that was busy before may still be.
const unknownFor = time.Minute

// activity is what is known of a session's chats.
type activity struct {
	once         sync.Once
	ended, began chan struct{} // hold one: a turn has ended, the first chat has become busy

	mu      sync.Mutex
	chats   map[string]bool // busy ones
	unknown time.Time       // busy until then, whatever the chats
	last    time.Time       // when the last turn ended
}

func (a *activity) make() {
	a.once.Do(func() { a.ended, a.began = make(chan struct{}, 1), make(chan struct{}, 1) })
}

func (a *activity) turn() chan struct{} {
	a.make()
	return a.ended
}

// start of work, where all chats had rested.
func (a *activity) start() chan struct{} {
	a.make()
	return a.began
}

func (a *activity) turnTime() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

func (a *activity) busy() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.chats) > 0 || time.Now().Before(a.unknown)
}

// Listening says that OpenCode's events are listened to from now on.
func (s *Session) Listening() {
	a := &s.activity
	a.mu.Lock()
	defer a.mu.Unlock()
	a.chats, a.unknown = map[string]bool{}, time.Now().Add(unknownFor)
}

// Event takes an event of the session's OpenCode.
func (s *Session) Event(e opencode.Event) {
	chat, busy, ok := opencode.ChatStatus(e)
	if !ok {
		return
	}
	a := &s.activity
	a.mu.Lock()
	defer a.mu.Unlock()
	if busy {
		if a.chats == nil {
			a.chats = map[string]bool{}
		}
		if len(a.chats) == 0 {
			select {
			case a.start() <- struct{}{}:
			default:
			}
		}
		a.chats[chat] = true
		return
	}
	delete(a.chats, chat)
	a.unknown, a.last = time.Time{}, time.Now()
	select {
	case a.turn() <- struct{}{}:
	default:
	}
}
