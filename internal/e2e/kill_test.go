//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// TestKill kills each of our processes with SIGKILL while a prompt runs. The
// session goes on, and the client sees the answer.
func TestKill(t *testing.T) {
	f := shared(t)
	m := model(t)
	id := f.session(t, "kill", nil)
	oc := f.openCode(id)
	pid := f.containerPID(t, id)

	const parts = 12
	for _, c := range []struct {
		name    string
		process func() *process
		// while runs while the process is dead.
		while func(t *testing.T, chat string)
		gap   bool // what happened meanwhile may be missing, if it is said
	}{
		{"server", func() *process { return f.server }, func(t *testing.T, chat string) {
			// Traffic does not pass through the server: all of it goes on.
			other := oc.newChat(t)
			if got := oc.prompt(t, other, "hello without a server").text(); got != "You said: hello without a server" {
				t.Errorf("a prompt while the server is dead is answered with %q", got)
			}
			if _, err := oc.messages(bounded(t, 10*time.Second), chat); err != nil {
				t.Error(err)
			}
		}, false},
		{"gateway", func() *process { return f.gateway }, func(t *testing.T, _ string) {
			if got := f.get(t, id).GetState(); got != cloudcodev1.Session_RUNNING {
				t.Errorf("the session is %v while the gateway is dead", got)
			}
		}, false},
		{"nodeagent", func() *process { return f.node }, func(t *testing.T, _ string) {
			if got := f.containerPID(t, id); got != pid {
				t.Errorf("the container's process is %s, was %s", got, pid)
			}
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			key := "kill-" + c.name
			chat := oc.newChat(t)
			sse := f.follow(t, id)
			oc.begin(t, chat, fmt.Sprintf("slow %s %d", key, parts))
			delta := func(n int) func(event) bool {
				return func(e event) bool {
					return e.kind == "opencode" && strings.Contains(e.data, fmt.Sprintf("part%d ", n)) && strings.Contains(e.data, chat)
				}
			}
			m.release(key, 4)
			sse.wait(t, "of part 4", delta(4))

			p := c.process()
			p.kill(t)
			m.release(key, 4) // said while the process is dead
			c.while(t, chat)
			p.start(t)
			f.waitReady(t)

			// The rest is said once the client hears something again.
			m.release(key, 1)
			eventually(t, 30*time.Second, "the client hears the chat again", func() string {
				list := sse.list()
				for _, e := range list {
					if delta(9)(e) {
						return ""
					}
				}
				if c.gap { // what was said while nobody listened is not repeated
					before := len(list)
					if sse.count("gap") > 0 && before > 0 {
						return ""
					}
				}
				return fmt.Sprintf("%d events, %v", len(list), sse.err)
			})
			m.release(key, parts-9)
			oc.waitAnswer(t, chat, slowAnswer(parts))
			got := sse.wait(t, "idle", func(e event) bool { return e.isIdle(chat) })

			if now := f.containerPID(t, id); now != pid {
				t.Errorf("the container's process is %s, was %s", now, pid)
			}
			s := f.get(t, id)
			if s.GetState() != cloudcodev1.Session_RUNNING || s.GetGeneration() != 1 || s.GetRestartCount() != 0 {
				t.Errorf("the session is %v", s)
			}
			if gaps := sse.count("gap"); !c.gap && gaps > 0 {
				t.Errorf("%d gaps", gaps)
			}
			seen := map[string]bool{}
			for _, e := range got {
				if e.id != "" && seen[e.id] {
					t.Errorf("event %s came twice", e.id)
				}
				seen[e.id] = true
			}
			if c.gap {
				return
			}
			// Nothing was left out: the node still holds it all, and says the same.
			mine := openCodeEvents(got)
			all := openCodeEvents(f.watchSSE(t, id, mine[0].id).wait(t, "idle, once more", func(e event) bool { return e.isIdle(chat) }))
			compareEvents(t, mine[1:], all)
		})
	}
}

// TestAcknowledgedCreatesSurvive kills the server with SIGKILL again and again
// while clients create sessions: what was acknowledged is there, and a create
// that was tried again made one session.
func TestAcknowledgedCreatesSurvive(t *testing.T) {
	needReal(t)
	f := newFleet(t, "creates")
	f.startServer(t)
	f.endAfter(t)

	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	var mu sync.Mutex
	acked := map[string]string{} // uid by name
	lost := 0                    // answers that did not come
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for c := range 4 {
		clients.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				req := &cloudcodev1.CreateSessionRequest{RequestId: uuid.NewString(), Session: &cloudcodev1.Session{
					Labels: map[string]string{"client": fmt.Sprint(c), "number": fmt.Sprint(i)},
					Spec:   &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"no": "such-node"}},
				}}
				for {
					s, err := f.sessions.CreateSession(ctx, req)
					if err == nil {
						mu.Lock()
						if _, twice := acked[s.GetName()]; twice {
							t.Errorf("%s was given to two creates", s.GetName())
						}
						acked[s.GetName()] = s.GetUid()
						mu.Unlock()
						break
					}
					if status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled || ctx.Err() != nil {
						t.Errorf("create: %v", err)
						return
					}
					mu.Lock()
					lost++
					mu.Unlock()
					select {
					case <-time.After(20 * time.Millisecond):
					case <-ctx.Done():
					}
				}
			}
		})
	}
	random := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	const kills = 6
	for range kills {
		before := func() int { mu.Lock(); defer mu.Unlock(); return len(acked) }()
		eventually(t, 20*time.Second, "creates are acknowledged", func() string {
			mu.Lock()
			defer mu.Unlock()
			if len(acked) < before+20 {
				return fmt.Sprintf("%d of %d", len(acked)-before, 20)
			}
			return ""
		})
		<-time.After(time.Duration(random.IntN(150)) * time.Millisecond) // any moment
		f.server.kill(t)
		f.server.start(t)
	}
	close(stop)
	clients.Wait()

	stored := map[string]*cloudcodev1.Session{}
	byLabels := map[string]string{}
	for token := ""; ; {
		resp, err := f.sessions.ListSessions(ctx, &cloudcodev1.ListSessionsRequest{PageSize: 500, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range resp.GetSessions() {
			stored[s.GetName()] = s
			key := s.GetLabels()["client"] + "/" + s.GetLabels()["number"]
			if other, twice := byLabels[key]; twice {
				t.Errorf("create %s made both %s and %s", key, other, s.GetName())
			}
			byLabels[key] = s.GetName()
		}
		if token = resp.GetNextPageToken(); token == "" {
			break
		}
	}
	for name, uid := range acked {
		if s := stored[name]; s.GetUid() != uid || s.GetState() != cloudcodev1.Session_PENDING {
			t.Errorf("%s, uid %s, was acknowledged; there is %v", name, uid, s)
		}
	}
	if len(stored) != len(acked) {
		t.Errorf("%d sessions, but %d were acknowledged and every create was tried until it was", len(stored), len(acked))
	}
	if lost == 0 {
		t.Error("no kill hit a create: this test has shown nothing")
	}
	t.Logf("%d sessions acknowledged over %d kills; %d tries were not answered", len(acked), kills, lost)
}

// TestServerDiskFull: a create that cannot be stored is refused and says why, and
// works once there is space again.
func TestServerDiskFull(t *testing.T) {
	needReal(t)
	f := newFleet(t, "serverfull")
	mountTmpfs(t, f.serverDir, "3m")
	f.startServer(t)
	f.endAfter(t)
	big := &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{
		Env: map[string]string{"BIG": strings.Repeat("x", 100<<10)}, NodeSelector: map[string]string{"no": "such-node"},
	}}
	ctx := bounded(t, time.Minute)
	first, err := f.sessions.CreateSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: idPrefix + "first", Session: big})
	if err != nil {
		t.Fatal(err)
	}
	fill(t, filepath.Join(f.serverDir, "filler"))
	for i := range 100 {
		if _, err = f.sessions.CreateSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: fmt.Sprintf("%sfull-%d", idPrefix, i), Session: big}); err != nil {
			break
		}
	}
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "disk is full") {
		t.Fatalf("create on a full disk: %v", err)
	}
	// It still answers, and has what it acknowledged.
	got, err := f.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: first.GetName()})
	if err != nil || got.GetUid() != first.GetUid() {
		t.Errorf("get on a full disk: %v %v", got, err)
	}
	unfill(t, filepath.Join(f.serverDir, "filler"))
	again := idPrefix + "again"
	eventually(t, 20*time.Second, "creates work again", func() string {
		if _, err := f.sessions.CreateSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: again, Session: &cloudcodev1.Session{}}); err != nil {
			return err.Error()
		}
		return ""
	})
	f.server.kill(t)
	f.server.start(t)
	eventually(t, 20*time.Second, "the server is back with what it stored", func() string {
		for _, name := range []string{first.GetName(), "sessions/" + again} {
			if _, err := f.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: name}); err != nil {
				return err.Error()
			}
		}
		return ""
	})
}

// TestNodeDiskFull: a session whose node has no space says so, and starts when
// there is some.
func TestNodeDiskFull(t *testing.T) {
	needReal(t)
	f := newFleet(t, "nodefull")
	mountTmpfs(t, f.nodeDir, "64m")
	f.startServer(t)
	f.endAfter(t)
	f.startMembers(t)
	f.waitReady(t)
	fill(t, filepath.Join(f.nodeDir, "filler"))
	// The image does not exist: what is tried before it is what fails first.
	s := f.create(t, "nodefull", &cloudcodev1.SessionSpec{Image: "localhost/e2e/missing:1"})
	id := strings.TrimPrefix(s.GetName(), "sessions/")
	s = f.waitState(t, id, cloudcodev1.Session_FAILED)
	if s.GetReason() != "NODE_DISK_FULL" || !strings.Contains(s.GetMessage(), "space") {
		t.Errorf("on a full disk: %s: %s", s.GetReason(), s.GetMessage())
	}
	code, body, err := f.call(bounded(t, 20*time.Second), "GET", "http://"+f.host(id)+"/global/health", nil)
	if err != nil || code != http.StatusServiceUnavailable || !strings.Contains(string(body), "NODE_DISK_FULL") {
		t.Errorf("the gateway answers %d %s %v", code, body, err)
	}
	unfill(t, filepath.Join(f.nodeDir, "filler"))
	f.waitSession(t, id, "past the full disk", func(s *cloudcodev1.Session) bool { return s.GetReason() != "NODE_DISK_FULL" && s.GetReason() != "" })
}
