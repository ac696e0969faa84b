package gateway

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
)

// Back-off of streams to the server.
const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 3 * time.Second
)

// backoff returns how long to wait before try n (0 is the first retry), half of
// it by chance, so that gateways do not come back all at once.
func backoff(n int) time.Duration {
	d := lastRetry
	if n < 5 {
		d = firstRetry << n
	}
	return d/2 + rand.N(d/2)
}

// route is where a session's traffic goes. It is never changed after it was made.
type route struct {
	id       string
	session  *cloudcodev1.Session
	node     string
	password string
}

func (r *route) running() bool { return r.session.GetState() == cloudcodev1.Session_RUNNING }

// routes is what the gateway knows of sessions. It outlives the connection to
// the server: while that is away, traffic goes on as it was.
type routes struct {
	// moved is called, one call at a time, when a session's traffic goes
	// elsewhere or nowhere; now is nil when the session is gone.
	moved func(id string, now *route)

	mu        sync.Mutex
	byID      map[string]*route
	synced    bool          // a full set was received once
	connected bool          // the stream stands
	changed   chan struct{} // closed at the next change
}

func newRoutes(moved func(id string, now *route)) *routes {
	return &routes{moved: moved, byID: map[string]*route{}, changed: make(chan struct{})}
}

// get returns the route, or nil; and a channel that is closed when anything has changed.
func (t *routes) get(id string) (r *route, synced bool, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id], t.synced, t.changed
}

// status reports whether a full set was ever received, and whether the server
// is connected now.
func (t *routes) status() (synced, connected bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.synced, t.connected
}

// await waits until done says so, or ctx ends. It returns the route as it is then.
func (t *routes) await(ctx context.Context, id string, done func(r *route, synced bool) bool) (r *route, synced bool) {
	for {
		r, synced, changed := t.get(id)
		if done(r, synced) {
			return r, synced
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return r, synced
		}
	}
}

// replace puts a full set in place of what is there.
func (t *routes) replace(full map[string]*route) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.byID
	t.byID, t.synced = full, true
	for id, was := range old {
		t.tell(was, full[id], id)
	}
	t.wake()
}

func (t *routes) change(upserts []*route, removes []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, id := range removes {
		if was, ok := t.byID[id]; ok {
			delete(t.byID, id)
			t.tell(was, nil, id)
		}
	}
	for _, now := range upserts {
		was := t.byID[now.id]
		t.byID[now.id] = now
		if was != nil {
			t.tell(was, now, now.id)
		}
	}
	t.wake()
}

func (t *routes) tell(was, now *route, id string) {
	if t.moved != nil && (now == nil || placeOf(was) != placeOf(now) || was.session.GetGeneration() != now.session.GetGeneration()) {
		t.moved(id, now)
	}
}

func (t *routes) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *routes) setConnected(c bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.connected = c
}

// watch follows the server until ctx ends, connecting again with back-off.
func (t *routes) watch(ctx context.Context, server grpc.ClientConnInterface, req *gatewayv1.WatchRoutesRequest, log *slog.Logger) {
	client := gatewayv1.NewRouteServiceClient(server)
	for failures := 0; ctx.Err() == nil; failures++ {
		got, err := t.follow(ctx, client, req)
		t.setConnected(false)
		if ctx.Err() != nil {
			return
		}
		if got {
			failures = 0
		}
		level := slog.LevelDebug
		if failures == 0 {
			level = slog.LevelWarn
		}
		log.Log(ctx, level, "the server is away; serving from what is known", "error", err)
		sleep(ctx, backoff(failures))
	}
}

// follow reads one stream to its end. got says that a full set came over it.
func (t *routes) follow(ctx context.Context, client gatewayv1.RouteServiceClient, req *gatewayv1.WatchRoutesRequest) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.WatchRoutes(ctx, req)
	if err != nil {
		return false, err
	}
	full := map[string]*route{}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return got, err
		}
		if chunk := resp.GetSnapshot(); chunk != nil {
			for _, r := range convert(chunk.GetRoutes()) {
				full[r.id] = r
			}
			if chunk.GetLast() {
				t.replace(full)
				t.setConnected(true)
				full, got = map[string]*route{}, true
			}
		}
		if changes := resp.GetChanges(); changes != nil {
			t.change(convert(changes.GetUpserts()), trimNames(changes.GetRemoves()))
		}
	}
}

func convert(in []*gatewayv1.Route) []*route {
	out := make([]*route, 0, len(in))
	for _, r := range in {
		out = append(out, &route{
			id:       strings.TrimPrefix(r.GetSession().GetName(), "sessions/"),
			session:  r.GetSession(),
			node:     r.GetNodeId(),
			password: r.GetOpencodePassword(),
		})
	}
	return out
}

// trimNames takes ids, also when they come as resource names.
func trimNames(in []string) []string {
	out := make([]string, 0, len(in))
	for _, s := range in {
		out = append(out, strings.TrimPrefix(s, "sessions/"))
	}
	return out
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
