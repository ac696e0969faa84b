package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// echo answers with what arrived.
func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.Header().Set("X-Upstream", "1")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"method": r.Method, "uri": r.RequestURI, "host": r.Host, "headers": r.Header, "body": string(body),
	})
}

type echoed struct {
	Method, URI, Host, Body string
	Headers                 http.Header
}

func decode(t *testing.T, a answer) (e echoed) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), &e); err != nil {
		t.Fatalf("%d %q: %v", a.code, a.body, err)
	}
	return e
}

func TestProxyByHostAndPath(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	r.run("main", echo)
	r.backend("main", 1, 3000, echo)

	for _, c := range []struct{ url, uri, prefix string }{
		{r.url("main.localhost", "/a%2Fb//c?x=1;y=%zz&"), "/a%2Fb//c?x=1;y=%zz&", ""},
		{r.url("MAIN.localhost", "/"), "/", ""},
		{r.url("3000--main.localhost", "/x"), "/x", ""},
		{r.url("", "/v1/sessions/main/proxy/a%2Fb?x=1"), "/a%2Fb?x=1", "/v1/sessions/main/proxy"},
		{r.url("", "/v1/sessions/main/proxy"), "/", "/v1/sessions/main/proxy"},
		{r.url("", "/v1/sessions/main/ports/3000/x/"), "/x/", "/v1/sessions/main/ports/3000"},
	} {
		e := decode(t, r.do(http.MethodPost, c.url, strings.NewReader("hello"), "X-Forwarded-For", "6.6.6.6", "X-Forwarded-Prefix", "/forged", "Cookie", "a=b"))
		if got := e.Headers.Get("Cookie"); (got == "") != (c.prefix != "") {
			t.Errorf("%s: cookie %q", c.url, got)
		}
		if e.URI != c.uri || e.Body != "hello" || e.Method != http.MethodPost {
			t.Errorf("%s reached the session as %s %s %q", c.url, e.Method, e.URI, e.Body)
		}
		if got := e.Headers.Get("X-Forwarded-Prefix"); got != c.prefix {
			t.Errorf("%s: prefix %q", c.url, got)
		}
		if got := e.Headers.Get("X-Forwarded-For"); got != "127.0.0.1" {
			t.Errorf("%s: X-Forwarded-For %q", c.url, got)
		}
		if !strings.EqualFold(e.Host, strings.Split(c.url, "/")[2]) || e.Headers.Get("X-Forwarded-Host") == "" || e.Headers.Get("X-Forwarded-Proto") != "http" {
			t.Errorf("%s: host %q, %v", c.url, e.Host, e.Headers)
		}
	}
	if a := r.get(r.url("4000--main.localhost", "/")); a.code != http.StatusBadGateway || !strings.Contains(a.body, "Port 4000 of session main cannot be reached") {
		t.Errorf("closed port: %d %s", a.code, a.body)
	}
	for _, u := range []string{r.url("nobody.localhost", "/"), r.url("", "/v1/sessions/nobody/proxy/"), r.url("a.b.localhost", "/"), r.url("", "/nothing")} {
		if a := r.get(u); a.code != http.StatusNotFound || !strings.Contains(a.body, `"code":5`) {
			t.Errorf("%s: %d %s", u, a.code, a.body)
		}
	}
}

func TestRootSession(t *testing.T) {
	r := start(t, Config{RootSession: "main"})
	r.linkNode()
	r.run("main", echo)
	if e := decode(t, r.get(r.url("", "/session/x"))); e.URI != "/session/x" {
		t.Errorf("the bare host does not lead to the root session: %+v", e)
	}
	if e := decode(t, r.get(r.url("", "/"))); e.URI != "/" {
		t.Errorf("the bare host does not lead to the root session: %+v", e)
	}
	for path, want := range map[string]string{"/cloudcode/": "<!doctype html>", "/healthz": "ok", "/readyz": "ok", "/v1/sessions": `"sessions"`, "/v1/nothing": `"code":5`} {
		if a := r.get(r.url("", path)); !strings.Contains(a.body, want) || a.h.Get("X-Upstream") != "" {
			t.Errorf("%s is not the gateway's: %d %.100q", path, a.code, a.body)
		}
	}
}

func TestCredentialsStopAtTheGateway(t *testing.T) {
	r := start(t, Config{Username: "ann", Password: "pw"})
	r.linkNode()
	r.run("main", echo)
	r.backend("main", 1, 3000, echo)
	token := "YW5uOnB3" // ann:pw
	for _, c := range []struct {
		url  string
		auth string
	}{
		{r.url("main.localhost", "/x?a=1"), "Basic " + token},
		{r.url("main.localhost", "/x?a=1&auth_token="+token), ""},
		{r.url("main.localhost", "/x?auth%5Ftoken="+token+"&a=1"), ""},
		{r.url("main.localhost", "/x?a=1&auth_token=d3Jvbmc6eA=="), "Basic " + token},
		{r.url("3000--main.localhost", "/x?a=1"), "Basic " + token},
		{r.url("3000--main.localhost", "/x?a=1&auth_token="+token), ""},
	} {
		// As of a page that was opened with a token in its address.
		headers := []string{"Referer", "http://main.localhost/p?auth_token=" + token + "&b=2"}
		if c.auth != "" {
			headers = append(headers, "Authorization", c.auth)
		}
		a := r.get(c.url, headers...)
		e := decode(t, a)
		if got := e.Headers.Get("Referer"); got != "http://main.localhost/p?b=2" {
			t.Errorf("%s: Referer %q", c.url, got)
		}
		if strings.Contains(a.body, token) || strings.Contains(e.URI, "auth") || e.URI != "/x?a=1" {
			t.Errorf("%s: the session sees %s", c.url, a.body)
		}
		user, pass, ok := (&http.Request{Header: e.Headers}).BasicAuth()
		if strings.Contains(c.url, "3000--") {
			if ok {
				t.Errorf("%s: OpenCode's password goes to another port", c.url)
			}
		} else if user != "opencode" || pass != "inner-main" {
			t.Errorf("%s: OpenCode gets %q %q", c.url, user, pass)
		}
	}
}

func TestServerSentEventsAreNotHeldBack(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	next := make(chan string)
	gone := make(chan struct{})
	r.run("main", func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		for {
			select {
			case s := <-next:
				fmt.Fprintf(w, "data: %s\n\n", s)
				_ = http.NewResponseController(w).Flush()
			case <-req.Context().Done():
				close(gone)
				return
			}
		}
	})
	resp, body := r.stream(r.url("main.localhost", "/global/event"))
	if resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	// Each is read before the next is written: anything that buffers hangs here.
	for i := range 3 {
		next <- fmt.Sprint("n", i)
		if line, err := body.ReadString('\n'); err != nil || line != fmt.Sprintf("data: n%d\n", i) {
			t.Fatalf("got %q, %v", line, err)
		}
		_, _ = body.ReadString('\n')
	}
	resp.Body.Close()
	select {
	case <-gone:
	case <-time.After(bound):
		t.Fatal("the session does not learn that the client has gone")
	}
}

func (r *rig) dialWS(url string, h http.Header) (*websocket.Conn, *http.Response, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), bound)
	defer cancel()
	return websocket.Dial(ctx, url, &websocket.DialOptions{HTTPClient: r.client, HTTPHeader: h})
}

func wsEcho(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true}) // as OpenCode: any origin
	if err != nil {
		return
	}
	defer c.CloseNow()
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil || c.Write(r.Context(), kind, append([]byte(r.URL.RawQuery+":"), data...)) != nil {
			return
		}
	}
}

func TestWebSocket(t *testing.T) {
	r := start(t, Config{Username: "ann", Password: "pw", TrustedOrigins: []string{"https://app.example.com"}})
	r.linkNode()
	r.run("main", wsEcho)
	r.backend("main", 1, 3000, wsEcho)
	r.run("other", wsEcho)
	token := "?x=1&auth_token=YW5uOnB3"
	for _, c := range []struct {
		host, origin string
		ok           bool
	}{
		{"main.localhost", "", true},
		{"main.localhost", r.url("main.localhost", ""), true},
		{"main.localhost", "https://app.example.com", true},
		{"main.localhost", "https://evil.example.com", false},
		{"main.localhost", "null", false},
		{"main.localhost", r.url("other.localhost", ""), false},
		{"main.localhost", r.url("3000--main.localhost", ""), false},
		{"main.localhost", r.url("", ""), false},
		{"3000--main.localhost", r.url("3000--main.localhost", ""), true},
		{"3000--main.localhost", r.url("5173--main.localhost", ""), true},
		{"3000--main.localhost", r.url("5173--other.localhost", ""), false},
	} {
		h := http.Header{}
		if c.origin != "" {
			h.Set("Origin", c.origin)
		}
		ws, resp, err := r.dialWS(r.url(c.host, "/pty"+token), h)
		if !c.ok {
			if err == nil {
				ws.CloseNow()
				t.Errorf("%s from %q is let in", c.host, c.origin)
			} else if resp == nil || resp.StatusCode != http.StatusForbidden {
				t.Errorf("%s from %q: %v", c.host, c.origin, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s from %q: %v", c.host, c.origin, err)
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), bound)
		if err := ws.Write(ctx, websocket.MessageText, []byte("hi")); err != nil {
			t.Error(err)
		}
		if _, data, err := ws.Read(ctx); err != nil || string(data) != "x=1:hi" {
			t.Errorf("%s: got %q, %v", c.host, data, err)
		}
		cancel()
		ws.CloseNow()
	}
	if _, resp, err := r.dialWS(r.url("main.localhost", "/pty?auth_token=eDp5"), nil); err == nil || resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a wrong auth_token is accepted: %v", err)
	}
}

func TestStartingSession(t *testing.T) {
	r := start(t, Config{StartWait: bound})
	r.linkNode()
	starting := session("main", cloudcodev1.Session_STARTING, 1)
	starting.Session.Progress = &cloudcodev1.StartProgress{Phase: "image", Detail: "Pulling <b>", CurrentBytes: 25, TotalBytes: 100}
	r.put(starting)

	// A browser is shown how far it is.
	a := r.get(r.url("main.localhost", "/x"), "Accept", "text/html,*/*", "Sec-Fetch-Mode", "navigate")
	if a.code != http.StatusServiceUnavailable || a.h.Get("Retry-After") == "" {
		t.Errorf("browser: %d %v", a.code, a.h)
	}
	for _, want := range []string{`http-equiv="refresh"`, "Pulling &lt;b&gt;", `value="25"`, "STARTING"} {
		if !strings.Contains(a.body, want) {
			t.Errorf("the page lacks %q:\n%s", want, a.body)
		}
	}
	// A program waits for it.
	got := make(chan answer)
	go func() { got <- r.get(r.url("main.localhost", "/x"), "Accept", "*/*") }()
	r.run("main", echo)
	if e := decode(t, <-got); e.URI != "/x" {
		t.Errorf("%+v", e)
	}
}

func TestNotRunning(t *testing.T) {
	r := start(t, Config{StartWait: time.Millisecond})
	for state, code := range map[cloudcodev1.Session_State]int{
		cloudcodev1.Session_PENDING: 503, cloudcodev1.Session_STARTING: 503, cloudcodev1.Session_FAILED: 503,
		cloudcodev1.Session_LOST: 503, cloudcodev1.Session_DELETING: 404,
	} {
		rt := session("main", state, 1)
		rt.Session.Reason, rt.Session.Message = "SOME_REASON", "do <this>"
		r.put(rt)
		a := r.get(r.url("main.localhost", "/"), "Accept", "application/json")
		var st struct {
			Code    int
			Message string
			Details []struct{ Reason, Domain string }
		}
		if err := json.Unmarshal([]byte(a.body), &st); err != nil || a.code != code || len(st.Details) != 1 || st.Details[0].Domain != "cloudcode" {
			t.Errorf("%v: %d %s", state, a.code, a.body)
		}
		if code == 503 && (a.h.Get("Retry-After") == "" || !strings.Contains(st.Message, "SOME_REASON") || !strings.Contains(st.Message, "do <this>")) {
			t.Errorf("%v: %v %s", state, a.h, st.Message)
		}
		p := r.get(r.url("main.localhost", "/"), "Accept", "text/html")
		if p.code != code || !strings.HasPrefix(p.body, "<!doctype html>") || strings.Contains(p.body, "<this>") {
			t.Errorf("%v: %d %s", state, p.code, p.body)
		}
	}
}

func TestLinkDown(t *testing.T) {
	r := start(t, Config{LinkWait: bound})
	r.run("main", echo)
	// No node yet: the request waits for it.
	got := make(chan answer)
	go func() { got <- r.get(r.url("main.localhost", "/x")) }()
	r.linkNode()
	if e := decode(t, <-got); e.URI != "/x" {
		t.Errorf("%+v", e)
	}
}

func TestLinkStaysDown(t *testing.T) {
	r := start(t, Config{LinkWait: time.Millisecond})
	r.run("main", echo)
	a := r.get(r.url("main.localhost", "/x"))
	if a.code != http.StatusBadGateway || !strings.Contains(a.body, "NODE_NOT_LINKED") || !strings.Contains(a.body, "Node n1") || a.h.Get("Retry-After") == "" {
		t.Errorf("%d %s", a.code, a.body)
	}
}

func TestGenerationChangesMidFlight(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	arrived := make(chan struct{}, 2)
	r.run("main", func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/stream" {
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
		}
		arrived <- struct{}{}
		<-req.Context().Done()
	})
	r.backend("main", 2, openCodePort, echo)
	got := make(chan answer)
	go func() { got <- r.get(r.url("main.localhost", "/prompt")) }()
	_, body := r.stream(r.url("main.localhost", "/stream"))
	<-arrived
	<-arrived
	r.put(session("main", cloudcodev1.Session_STARTING, 2))
	r.put(session("main", cloudcodev1.Session_RUNNING, 2))
	if a := <-got; a.code != http.StatusBadGateway || !strings.Contains(a.body, "SESSION_MOVED") {
		t.Errorf("%d %s", a.code, a.body)
	}
	if _, err := io.ReadAll(body); err == nil {
		t.Error("a stream of the old generation ends as if it were whole")
	}
	if e := decode(t, r.get(r.url("main.localhost", "/x"))); e.URI != "/x" {
		t.Errorf("the new generation is not reached: %+v", e)
	}
	// A request that still holds the old route does not get the new one's way.
	before := session("main", cloudcodev1.Session_RUNNING, 1)
	before.NodeId = "n0"
	if old := r.gw.ups.get(convert([]*gatewayv1.Route{before})[0]); old.ctx.Err() == nil {
		t.Error("an old place is dialled again")
	}
}

// A change of limits is a new assignment, too, but the container goes on: a
// prompt that runs must not be cut off by it.
func TestGenerationChangesInPlace(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	arrived, finish := make(chan struct{}), make(chan struct{})
	r.run("main", func(w http.ResponseWriter, _ *http.Request) {
		close(arrived)
		<-finish
		w.WriteHeader(http.StatusOK)
	})
	r.backend("main", 2, openCodePort, echo)
	got := make(chan answer)
	go func() { got <- r.get(r.url("main.localhost", "/prompt")) }()
	<-arrived
	r.put(session("main", cloudcodev1.Session_RUNNING, 2))
	if e := decode(t, r.get(r.url("main.localhost", "/x"))); e.URI != "/x" {
		t.Errorf("the new generation is not reached: %+v", e)
	}
	close(finish)
	if a := <-got; a.code != http.StatusOK {
		t.Errorf("the prompt was cut off: %d %s", a.code, a.body)
	}
}

func TestRemovedAndServerAway(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	r.run("main", echo)
	r.run("gone", echo)
	decode(t, r.get(r.url("gone.localhost", "/")))
	r.server.remove("gone")
	eventually(t, "removal", func() bool { rt, _, _ := r.gw.routes.get("gone"); return rt == nil })
	if a := r.get(r.url("gone.localhost", "/")); a.code != http.StatusNotFound {
		t.Errorf("%d", a.code)
	}

	r.server.stop()
	eventually(t, "loss of the server", func() bool { _, c := r.gw.routes.status(); return !c })
	decode(t, r.get(r.url("main.localhost", "/x")))
	if a := r.get(r.url("", "/readyz")); a.code != http.StatusOK || !strings.Contains(a.body, "away") {
		t.Errorf("%d %s", a.code, a.body)
	}
	if a := r.get(r.url("", "/v1/sessions")); a.code != http.StatusServiceUnavailable || a.h.Get("Retry-After") == "" || !strings.Contains(a.body, "SERVER_UNAVAILABLE") {
		t.Errorf("%d %v %s", a.code, a.h, a.body)
	}
	// What went while it was away is gone from the next full set.
	delete(r.server.routes, "sessions/main")
	r.server.start(t)
	eventually(t, "the next full set", func() bool { rt, _, _ := r.gw.routes.get("main"); return rt == nil })
	if a := r.get(r.url("main.localhost", "/x")); a.code != http.StatusNotFound {
		t.Errorf("%d", a.code)
	}
}

func TestServerNeverSeen(t *testing.T) {
	r := start(t, Config{StartWait: time.Millisecond})
	fresh := newRoutes(nil)
	r.gw.routes.mu.Lock()
	r.gw.routes.synced = false
	r.gw.routes.mu.Unlock()
	if _, synced, _ := fresh.get("x"); synced {
		t.Error("synced at birth")
	}
	if a := r.get(r.url("main.localhost", "/x")); a.code != http.StatusServiceUnavailable || !strings.Contains(a.body, "SERVER_UNAVAILABLE") {
		t.Errorf("%d %s", a.code, a.body)
	}
	if a := r.get(r.url("", "/readyz")); a.code != http.StatusServiceUnavailable {
		t.Errorf("%d", a.code)
	}
	if a := r.get(r.url("", "/healthz")); a.code != http.StatusOK {
		t.Errorf("%d", a.code)
	}
}

// A keep-alive connection that died while it was idle costs an idempotent
// request nothing.
func TestDeadKeepAlive(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	var conns atomic.Int32
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { // answers once a connection, and drops it at the second request
		defer close(done)
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			conns.Add(1)
			br := bufio.NewReader(c)
			if req, err := http.ReadRequest(br); err == nil {
				_, _ = io.Copy(io.Discard, req.Body)
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				_, _ = http.ReadRequest(br)
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { lis.Close(); <-done })
	t.Cleanup(func() { r.gw.ups.closeAll() })
	r.backends["main:1:2633"] = lis.Addr().String()
	r.put(session("main", cloudcodev1.Session_RUNNING, 1))
	for i := range 3 {
		if a := r.get(r.url("main.localhost", "/")); a.code != http.StatusOK || a.body != "ok" {
			t.Fatalf("request %d: %d %s", i, a.code, a.body)
		}
	}
	if conns.Load() != 3 {
		t.Errorf("%d connections: the test did not test anything", conns.Load())
	}
}

func TestSessionsStayInTheirOrigin(t *testing.T) {
	r := start(t, Config{TrustedOrigins: []string{"https://app.example.com"}})
	r.linkNode()
	r.run("main", func(w http.ResponseWriter, req *http.Request) {
		h := w.Header()
		h.Add("Set-Cookie", "a=1; Domain=localhost; Path=/; HttpOnly")
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Content-Type", "text/html")
		h.Set("Content-Security-Policy", "default-src 'self'")
		h.Set("X-Accel-Redirect", "/internal/secret")
		h.Set("NEL", `{"report_to":"x","max_age":9,"success_fraction":1}`)
		h.Set("Report-To", `{"group":"x"}`)
		if req.URL.Path == "/moved" {
			h.Set("Location", "/there")
			w.WriteHeader(http.StatusFound)
		}
	})
	a := r.get(r.url("main.localhost", "/"))
	if got := a.h.Get("Set-Cookie"); got != "a=1; Path=/; HttpOnly" {
		t.Errorf("cookie %q", got)
	}
	if a.h.Get("X-Accel-Redirect") != "" {
		t.Error("a session gives orders to the web server in front")
	}
	if a.h.Get("X-Frame-Options") != "SAMEORIGIN" {
		t.Error("another session may frame OpenCode")
	}
	a = r.get(r.url("main.localhost", "/"), "Origin", "https://evil.example.com")
	if got := a.h.Values("Access-Control-Allow-Origin"); len(got) != 0 {
		t.Errorf("a foreign page may read: %q", got)
	}
	a = r.get(r.url("main.localhost", "/"), "Origin", "https://app.example.com")
	if got := a.h.Values("Access-Control-Allow-Origin"); len(got) != 1 || got[0] != "https://app.example.com" {
		t.Errorf("a trusted page may not read: %q", got)
	}
	// Below a path a session shares the API's origin: nothing of it runs there.
	a = r.get(r.url("", "/v1/sessions/main/proxy/moved"))
	if got := a.h.Values("Content-Security-Policy"); len(got) != 2 || got[1] != "sandbox" {
		t.Errorf("policy %q", got)
	}
	if a.h.Get("Nel") != "" || a.h.Get("Report-To") != "" {
		t.Error("a session is told of the requests to the API's origin")
	}
	if a.h.Get("Set-Cookie") != "" || a.h.Get("Location") != "/v1/sessions/main/proxy/there" || a.h.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%v", a.h)
	}
}

func TestStopEndsStreamsAndLetsRequestsFinish(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	release, inside := make(chan struct{}), make(chan struct{}, 3)
	r.run("main", func(w http.ResponseWriter, req *http.Request) {
		switch req.URL.Path {
		case "/ws":
			wsEcho(w, req)
		case "/event":
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-req.Context().Done()
		default:
			inside <- struct{}{}
			<-release
			fmt.Fprint(w, "answer")
		}
	})
	_, events := r.stream(r.url("main.localhost", "/event"))
	ws, _, err := r.dialWS(r.url("main.localhost", "/ws"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	got := make(chan answer)
	go func() { got <- r.get(r.url("main.localhost", "/prompt")) }()
	<-inside
	stopped := make(chan error)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), bound)
		defer cancel()
		stopped <- r.gw.Stop(ctx)
	}()
	_, _ = io.ReadAll(events) // ends
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	if _, _, err := ws.Read(ctx); err == nil || ctx.Err() != nil {
		t.Errorf("the WebSocket goes on: %v", err)
	}
	close(release)
	if a := <-got; a.body != "answer" {
		t.Errorf("the prompt was cut: %d %s", a.code, a.body)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := r.gw.Wait(); err != nil {
		t.Error(err)
	}
}

func TestStopCutsWhatDoesNotEnd(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	inside := make(chan struct{})
	r.run("main", func(_ http.ResponseWriter, req *http.Request) { close(inside); <-req.Context().Done() })
	got := make(chan error)
	go func() {
		resp, err := r.client.Get(r.url("main.localhost", "/prompt"))
		if err == nil {
			resp.Body.Close()
		}
		got <- err
	}()
	<-inside
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.gw.Stop(ctx); err == nil {
		t.Error("Stop does not say that it cut a request")
	}
	<-got
}
