package gateway

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

// browser is headless Chromium, driven over its own protocol.
type browser struct {
	t    *testing.T
	ws   *websocket.Conn
	next int
	said []string // errors on the console, and exceptions
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CLOUDCODE_REQUIRE_REAL") == "1" {
			t.Fatal("chromium is not installed")
		}
		t.Skip("chromium is not installed")
	}
	dir := t.TempDir()
	cmd := exec.Command(path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-dev-shm-usage",
		"--user-data-dir="+dir, "--remote-debugging-port=0", "about:blank")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its helpers end with it
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-read
		_ = cmd.Wait()
	})
	address := make(chan string, 1)
	go func() {
		defer close(read)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			if _, url, ok := strings.Cut(s.Text(), "DevTools listening on ws://"); ok {
				address <- strings.SplitN(url, "/", 2)[0]
			}
		}
	}()
	var host string
	eventually(t, "chromium", func() bool {
		select {
		case host = <-address:
			return true
		default:
			return false
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	var pages []struct{ Type, WebSocketDebuggerURL string }
	eventually(t, "a page", func() bool {
		resp, err := client.Get("http://" + host + "/json/list")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return json.NewDecoder(resp.Body).Decode(&pages) == nil && len(pages) > 0
	})
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, pages[0].WebSocketDebuggerURL, &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	ws.SetReadLimit(64 << 20)
	t.Cleanup(func() { ws.CloseNow() })
	b := &browser{t: t, ws: ws}
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		b.call(domain+".enable", nil)
	}
	return b
}

func (b *browser) call(method string, params map[string]any) json.RawMessage {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), bound)
	defer cancel()
	b.next++
	msg, err := json.Marshal(map[string]any{"id": b.next, "method": method, "params": params})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.ws.Write(ctx, websocket.MessageText, msg); err != nil {
		b.t.Fatal(err)
	}
	for {
		_, data, err := b.ws.Read(ctx)
		if err != nil {
			b.t.Fatalf("%s: %v", method, err)
		}
		var got struct {
			ID     int
			Method string
			Params json.RawMessage
			Result json.RawMessage
			Error  *struct{ Message string }
		}
		if err := json.Unmarshal(data, &got); err != nil {
			b.t.Fatal(err)
		}
		switch {
		case got.Method == "Runtime.exceptionThrown", got.Method == "Log.entryAdded" && strings.Contains(string(got.Params), `"error"`):
			b.said = append(b.said, string(got.Params))
		case got.ID == b.next && got.Error != nil:
			b.t.Fatalf("%s: %s", method, got.Error.Message)
		case got.ID == b.next:
			return got.Result
		}
	}
}

// eval returns a JavaScript expression's value.
func (b *browser) eval(js string) any {
	b.t.Helper()
	var res struct {
		Result           struct{ Value any }
		ExceptionDetails json.RawMessage
	}
	raw := b.call("Runtime.evaluate", map[string]any{"expression": js, "returnByValue": true, "awaitPromise": true})
	if err := json.Unmarshal(raw, &res); err != nil {
		b.t.Fatal(err)
	}
	if res.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", js, res.ExceptionDetails)
	}
	return res.Result.Value
}

func (b *browser) await(js string) {
	b.t.Helper()
	eventually(b.t, js, func() bool { return b.eval(js) == true })
}

// shot writes a picture into $CLOUDCODE_SCREENSHOTS, for people to look at.
func (b *browser) shot(name string) {
	dir := os.Getenv("CLOUDCODE_SCREENSHOTS")
	if dir == "" {
		return
	}
	var res struct{ Data string }
	if err := json.Unmarshal(b.call("Page.captureScreenshot", nil), &res); err != nil {
		b.t.Fatal(err)
	}
	data, err := base64.StdEncoding.DecodeString(res.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), data, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) look(width, height int, scheme string) {
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}})
}

func TestDashboardInChromium(t *testing.T) {
	b := newBrowser(t)
	r := start(t, Config{})
	r.linkNode()
	now := timestamppb.Now()
	r.server.nodes = []*cloudcodev1.Node{
		{Name: "nodes/n1", State: cloudcodev1.Node_READY, Labels: map[string]string{"zone": "office"}, HeartbeatTime: now, SessionCount: 4, Info: &cloudcodev1.NodeInfo{CpuMillis: 16000, MemoryBytes: 64 << 30, Architecture: "amd64"}},
		{Name: "nodes/n2", State: cloudcodev1.Node_NOT_READY, Reason: "LEASE_EXPIRED", Message: "not heard of for 4 minutes", HeartbeatTime: now},
	}
	const evil = `"'><script>document.title="owned"</script><img src=x onerror='document.title="owned"'>`
	add := func(id string, st cloudcodev1.Session_State, f func(*cloudcodev1.Session)) *gatewayv1.Route {
		rt := session(id, st, 3)
		rt.Session.CreateTime, rt.Session.OpencodeVersion = now, "1.18.34"
		f(rt.Session)
		r.put(rt)
		return rt
	}
	main := add("main", cloudcodev1.Session_RUNNING, func(s *cloudcodev1.Session) { s.Labels = map[string]string{"team": "web", "evil": evil} })
	add("api-refactor", cloudcodev1.Session_STARTING, func(s *cloudcodev1.Session) {
		s.Progress = &cloudcodev1.StartProgress{Phase: "image", Detail: "Pulling the image", CurrentBytes: 98 << 20, TotalBytes: 168 << 20}
	})
	add("fix-flaky-tests", cloudcodev1.Session_FAILED, func(s *cloudcodev1.Session) {
		s.Reason, s.Message, s.RestartCount = "OOM_KILLED", "OpenCode used more than its 512 MiB. "+evil, 4
	})
	add("gpu-job", cloudcodev1.Session_PENDING, func(s *cloudcodev1.Session) {
		s.Reason, s.Message, s.Node = "NO_NODE", "no node has the label gpu=a100", ""
	})
	r.server.events = func(after string, s eventStream) error {
		_ = s.Send(beat(after))
		_ = s.Send(&cloudcodev1.SessionEvent{Id: "3-1", Event: &cloudcodev1.SessionEvent_Lifecycle{Lifecycle: &cloudcodev1.LifecycleEvent{Session: main.GetSession()}}})
		frame, _ := json.Marshal(map[string]any{"directory": "/w", "payload": map[string]any{"type": "message.part.updated", "properties": map[string]any{"part": map[string]any{"type": "text", "text": "Looking at the test " + evil}}}})
		for i := range 1000 {
			_ = s.Send(opencodeEvent(fmt.Sprint("3-", i+2), string(frame)))
		}
		_ = s.Send(&cloudcodev1.SessionEvent{Id: "3-2000", Event: &cloudcodev1.SessionEvent_Gap{Gap: &cloudcodev1.GapEvent{Message: "12 events are no longer held"}}})
		<-s.Context().Done()
		return s.Context().Err()
	}
	r.server.logs = func(_ *cloudcodev1.ReadSessionLogsRequest, s grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
		for i := range 60 {
			_ = s.Send(entry(i))
		}
		<-s.Context().Done()
		return nil
	}

	b.look(1280, 800, "light")
	b.call("Page.navigate", map[string]any{"url": r.url("", "/")})
	b.await(`document.querySelectorAll("#sessions .row").length === 4 && document.querySelectorAll("#nodes .row").length === 2`)
	b.shot("light")
	b.look(1280, 800, "dark")
	b.shot("dark")
	b.look(400, 860, "light")
	b.await(`document.documentElement.scrollWidth <= 400`) // nothing sticks out on a phone
	b.shot("phone")
	b.look(1280, 800, "dark")

	// Events arrive, bounded in number, and are readable.
	b.eval(`[...document.querySelectorAll("#sessions .name")].find((e) => e.textContent === "main").click()`)
	b.await(`document.querySelector("#p-events .gap") !== null && document.querySelectorAll("#p-events .ev").length <= 400`)
	b.await(`document.querySelector("#d-status").textContent.includes("live")`)
	b.shot("events")
	b.eval(`document.querySelector("[data-tab=logs]").click()`)
	b.await(`document.querySelector("#p-logs").textContent.includes("line 59\n")`)
	b.shot("logs")
	b.eval(`document.querySelector("[data-tab=spec]").click()`)
	b.await(`document.querySelector("#p-spec").textContent.includes("\"generation\": \"3\"")`)
	b.eval(`document.querySelector("#d-close").click()`)

	// Create sends what was filled in, and shows why it cannot.
	b.eval(`document.querySelector("#new").click(); const f = document.querySelector("#c-form"); f.elements.id.value = "fresh";
		f.elements.env.value = "A=b=c\n"; f.elements.labels.value = "team=web"; f.elements.memory.value = "1.5GiB"; f.elements.cpu.value = "x"; f.requestSubmit()`)
	b.await(`document.querySelector("#c-error").textContent.includes("CPUs")`)
	b.shot("create")
	b.eval(`f.elements.cpu.value = "0.5"; f.requestSubmit()`)
	b.await(`!document.querySelector("#create").open`)
	r.server.mu.Lock()
	made := r.server.created
	r.server.mu.Unlock()
	res := made.GetSession().GetSpec().GetResources()
	if made.GetSessionId() != "fresh" || len(made.GetRequestId()) != 36 || made.GetSession().GetSpec().GetEnv()["A"] != "b=c" ||
		made.GetSession().GetLabels()["team"] != "web" || res.GetMemoryBytes() != 3<<29 || res.GetCpuMillis() != 500 || res.GetPids() != 0 {
		t.Errorf("the form sent %v", made)
	}
	b.await(`document.querySelector("#d-title").textContent === "fresh"`)
	b.eval(`document.querySelector("#d-close").click()`)
	if title := b.eval(`document.title`); title != "Cloud Code" {
		t.Errorf("a name ran as script: title %q", title)
	}
	for _, s := range b.said {
		// The fake server does not know the session that it has "made".
		if !strings.Contains(s, "/v1/sessions/fresh/events") {
			t.Errorf("the browser complains: %s", s)
		}
	}

	// The page of a session that starts turns into the session.
	b.said = nil
	r.backend("api-refactor", 3, openCodePort, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<title>OpenCode</title>")
	})
	b.call("Page.navigate", map[string]any{"url": r.url("api-refactor.localhost", "/")})
	b.await(`document.querySelector("progress") !== null`)
	b.shot("starting")
	r.put(session("api-refactor", cloudcodev1.Session_RUNNING, 3))
	b.await(`document.title === "OpenCode"`)

	// Below a path, in the API's origin, nothing of a session runs.
	r.backend("main", 3, openCodePort, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, `<title>inert</title><script>document.title="owned"</script>`)
	})
	b.call("Page.navigate", map[string]any{"url": r.url("", "/v1/sessions/main/proxy/")})
	b.await(`document.readyState === "complete" && document.title !== "OpenCode"`)
	if title := b.eval(`document.title`); title != "inert" {
		t.Errorf("a session's script runs in the API's origin: %v", title)
	}
}

// What is in object storage is seen, and can be suspended, restored and forked.
func TestStorageInChromium(t *testing.T) {
	b := newBrowser(t)
	r := start(t, Config{})
	r.server.nodes = []*cloudcodev1.Node{{Name: "nodes/n1", State: cloudcodev1.Node_READY, HeartbeatTime: timestamppb.Now()}}
	ago := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-d)) }
	const evil = `<img src=x onerror='document.title="owned"'>`
	checkpoints := []*cloudcodev1.Checkpoint{
		{Id: "20261124t214900.123z-x7k2", CreateTime: ago(5 * time.Second), Trigger: "turn", Files: 3650, Bytes: 63 << 20, UploadedBytes: 12 << 10, Node: "nodes/n1", Notes: []string{"the socket run/app.sock was left out " + evil}},
		{Id: "20261124t204900.001z-aaaa", CreateTime: ago(time.Hour), Trigger: "manual", Files: 3600, Bytes: 60 << 20, UploadedBytes: 60 << 20, Node: "nodes/n2"},
	}
	r.server.checkpoints = func() []*cloudcodev1.Checkpoint { return checkpoints }
	kept := func(id string) *cloudcodev1.StorageStatus {
		return &cloudcodev1.StorageStatus{Mode: cloudcodev1.Storage_SNAPSHOT, Persistent: true, Uri: "s3://work/fleet/" + id, Checkpoint: checkpoints[0], MountState: cloudcodev1.StorageStatus_MOUNTED, Mounter: "tigrisfs"}
	}
	add := func(id string, st cloudcodev1.Session_State, f func(*cloudcodev1.Session)) {
		rt := session(id, st, 3)
		rt.Session.CreateTime, rt.Session.Storage = ago(time.Hour), kept(id)
		f(rt.Session)
		r.put(rt)
	}
	add("main", cloudcodev1.Session_RUNNING, func(*cloudcodev1.Session) {})
	add("asleep", cloudcodev1.Session_SUSPENDED, func(s *cloudcodev1.Session) { s.Node = "" })
	add("going", cloudcodev1.Session_SUSPENDING, func(s *cloudcodev1.Session) {
		s.Progress = &cloudcodev1.StartProgress{Phase: "checkpoint", Detail: "saving what is left", CurrentBytes: 20 << 20, TotalBytes: 63 << 20}
	})
	add("gone", cloudcodev1.Session_LOST, func(s *cloudcodev1.Session) {
		s.Reason, s.Message = "NODE_UNREACHABLE", "n1 has not been heard of for 4 minutes"
	})
	add("outage", cloudcodev1.Session_RUNNING, func(s *cloudcodev1.Session) {
		s.Storage.UnsavedSince, s.Storage.Message = ago(5*time.Minute), "object storage answers 503; what was done since is only on n1 "+evil
	})
	add("tigris", cloudcodev1.Session_RUNNING, func(s *cloudcodev1.Session) {
		s.Storage.Mode, s.Storage.MountState, s.Storage.Message = cloudcodev1.Storage_MOUNT, cloudcodev1.StorageStatus_MOUNT_FAILED, "TigrisFS ends with exit code 1"
	})
	add("scratch", cloudcodev1.Session_RUNNING, func(s *cloudcodev1.Session) { s.Storage = &cloudcodev1.StorageStatus{Mode: cloudcodev1.Storage_LOCAL} })
	r.server.events = func(after string, s eventStream) error {
		_ = s.Send(beat(after))
		_ = s.Send(&cloudcodev1.SessionEvent{Id: "3-1", Event: &cloudcodev1.SessionEvent_Checkpointed{Checkpointed: &cloudcodev1.CheckpointedEvent{Checkpoint: checkpoints[0]}}})
		<-s.Context().Done()
		return s.Context().Err()
	}

	const row = `((id) => [...document.querySelectorAll("#sessions .row")].find((e) => e.querySelector(".name").textContent === id))`
	storage := func(id string) string {
		b.t.Helper()
		s, _ := b.eval(fmt.Sprintf(`%s(%q).querySelector(".storage").textContent`, row, id)).(string)
		return s
	}
	press := func(where, label string) {
		t.Helper()
		b.eval(fmt.Sprintf(`[...%s.querySelectorAll("button")].find((e) => e.textContent === %q).click()`, where, label))
	}
	told := func(want string) {
		t.Helper()
		eventually(t, want, func() bool { return slices.Contains(r.server.calls(), want) })
	}

	b.look(1280, 900, "light")
	b.call("Page.navigate", map[string]any{"url": r.url("", "/")})
	b.await(`document.querySelectorAll("#sessions .row").length === 7`)
	b.shot("storage-light")
	for id, want := range map[string]string{
		"main": "snapshot · saved ", "outage": "snapshot · unsaved for 5 min", "tigris": "mount · saved ", "scratch": "not persistent",
	} {
		if have := storage(id); !strings.HasPrefix(have, want) {
			t.Errorf("%s: %q, want %q", id, have, want)
		}
	}
	if tip, _ := b.eval(row + `("scratch").querySelector(".storage .note").title`).(string); !strings.Contains(tip, "lost with it") {
		t.Errorf("what not persistent means is not said: %q", tip)
	}
	b.await(row + `("outage").textContent.includes("Storage: object storage answers 503")`)
	b.await(row + `("tigris").textContent.includes("mount failed")`)
	b.await(row + `("going").querySelector("progress") !== null && ` + row + `("going").querySelector(".badge").textContent === "Suspending"`)
	b.await(row + `("going").querySelector(".acts button").disabled`)
	b.look(900, 900, "dark")
	b.await(`document.documentElement.scrollWidth <= 900`)
	b.shot("storage-tablet")
	b.look(400, 860, "light")
	b.await(`document.documentElement.scrollWidth <= 400`)
	b.shot("storage-phone")
	b.look(1280, 900, "dark")
	b.shot("storage-dark")

	// Suspend asks, tells why it cannot, and does it.
	refuse := true
	r.server.act = func(what, name string) error {
		if what == "suspend" && refuse {
			refuse = false
			return grpcerr.New(codes.FailedPrecondition, "SESSION_DELETING", "not now")
		}
		if what == "suspend" {
			add("main", cloudcodev1.Session_SUSPENDED, func(s *cloudcodev1.Session) { s.Node = "" })
		}
		return nil
	}
	press(row+`("main")`, "Suspend")
	b.await(`document.querySelector("#ask").open && document.querySelector("#a-title").textContent === "Suspend session main?"`)
	b.shot("suspend")
	b.eval(`document.querySelector("#a-go").click()`)
	b.await(`document.querySelector("#a-error").textContent === "not now"`)
	b.eval(`document.querySelector("#a-go").click()`)
	b.await(`!document.querySelector("#ask").open && ` + row + `("main").querySelector(".badge").textContent === "Suspended"`)

	// Resume does it at once, but for a lost session.
	press(row+`("asleep")`, "Resume")
	told("resume sessions/asleep")
	press(row+`("gone")`, "Resume")
	b.await(`document.querySelector("#a-text").textContent.includes("what it has not saved is lost")`)
	b.eval(`document.querySelector("#a-cancel").click()`)
	if slices.Contains(r.server.calls(), "resume sessions/gone") {
		t.Error("a lost session was given up without a question")
	}

	// Checkpoints of a session: list, save, restore, fork.
	b.eval(row + `("outage").querySelector(".name").click()`)
	b.await(`document.querySelector("#p-events .checkpointed") !== null && document.querySelector("#p-events .checkpointed").textContent.includes("63 MiB in 3650 files")`)
	b.eval(`document.querySelector("[data-tab=checkpoints]").click()`)
	b.await(`document.querySelectorAll("#p-checkpoints tbody tr").length === 2`)
	b.await(`document.querySelector("#p-checkpoints").textContent.includes("the socket run/app.sock was left out")`)
	b.await(`document.querySelector("#p-checkpoints").scrollWidth <= document.querySelector("#p-checkpoints").clientWidth`)
	b.shot("checkpoints")
	b.look(400, 860, "light")
	b.await(`document.querySelector("#detail").scrollWidth <= 400`)
	b.shot("checkpoints-phone")
	b.look(1280, 900, "light")
	b.shot("checkpoints-light")
	href, _ := b.eval(`document.querySelectorAll("#p-checkpoints a")[1].getAttribute("href")`).(string)
	if href != "/v1/sessions/outage/archive?checkpoint=20261124t204900.001z-aaaa" {
		t.Errorf("download leads to %q", href)
	}
	press(`document.querySelector("#d-acts")`, "Save now")
	told("checkpoint sessions/outage")
	press(`document.querySelectorAll("#p-checkpoints tbody tr")[1]`, "Restore")
	b.await(`document.querySelector("#ask").open && document.querySelector("#a-text").textContent.includes("20261124t204900.001z-aaaa")`)
	b.shot("restore")
	b.eval(`document.querySelector("#a-go").click()`)
	told("restore 20261124t204900.001z-aaaa sessions/outage")
	b.await(`!document.querySelector("#ask").open`)
	press(`document.querySelectorAll("#p-checkpoints tbody tr")[1]`, "Fork")
	b.await(`document.querySelector("#ask").open`)
	b.eval(`const a = document.querySelector("#a-form"); a.elements.value.value = "try-it"; a.requestSubmit()`)
	told("fork try-it at 20261124t204900.001z-aaaa from sessions/outage")
	b.await(`!document.querySelector("#ask").open`)
	b.eval(`document.querySelector("#d-close").click()`)

	// Deleting keeps what is stored, unless told otherwise.
	press(row+`("tigris")`, "Delete")
	b.await(`document.querySelector("#x-uri").textContent === "s3://work/fleet/tigris" && !document.querySelector("#x-purge").hidden`)
	b.shot("delete")
	b.eval(`document.querySelector("#x-form").requestSubmit()`)
	told("delete purge=false sessions/tigris")
	b.await(`!document.querySelector("#delete").open`)
	press(row+`("tigris")`, "Delete")
	b.eval(`document.querySelector("#x-form").elements.purge.checked = true; document.querySelector("#x-form").requestSubmit()`)
	told("delete purge=true sessions/tigris")
	b.await(`!document.querySelector("#delete").open`)
	press(row+`("scratch")`, "Delete")
	b.await(`document.querySelector("#x-purge").hidden && document.querySelector("#x-text").textContent.includes("for good")`)

	if title := b.eval(`document.title`); title != "Cloud Code" {
		t.Errorf("a name ran as script: title %q", title)
	}
	for _, s := range b.said {
		// The first suspend was refused.
		if !strings.Contains(s, "/v1/sessions/main:suspend") {
			t.Errorf("the browser complains: %s", s)
		}
	}

	// The page of a suspended session says how to wake it.
	b.call("Page.navigate", map[string]any{"url": r.url("asleep.localhost", "/")})
	b.await(`document.readyState === "complete" && document.body.textContent.includes("cloudcode session resume asleep")`)
	b.shot("suspended")
}

// With a password, a browser that has signed in once uses everything: pages,
// fetch, event streams and WebSockets.
func TestSignedInChromium(t *testing.T) {
	b := newBrowser(t)
	r := start(t, Config{Username: "ann", Password: "pw"})
	r.linkNode()
	r.run("main", func(w http.ResponseWriter, req *http.Request) {
		switch req.URL.Path {
		case "/ws":
			wsEcho(w, req)
		case "/event":
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(w, "data: hello\n\n")
			_ = http.NewResponseController(w).Flush()
			<-req.Context().Done()
		case "/api":
			_, pass, _ := req.BasicAuth()
			fmt.Fprint(w, pass)
		default:
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<title>OpenCode</title>")
		}
	})
	b.call("Page.navigate", map[string]any{"url": strings.Replace(r.url("main.localhost", "/"), "http://", "http://ann:pw@", 1)})
	b.await(`document.title === "OpenCode"`)
	// Without the credentials in the address, as a user has it.
	b.call("Page.navigate", map[string]any{"url": r.url("main.localhost", "/again")})
	b.await(`location.pathname === "/again" && document.title === "OpenCode"`)
	for what, js := range map[string]string{
		"fetch":       `fetch("/api", {method: "POST"}).then((r) => r.text())`,
		"EventSource": `new Promise((ok) => { const e = new EventSource("/event"); e.onmessage = (m) => { e.close(); ok(m.data) }; e.onerror = () => ok("error") })`,
		"WebSocket":   `new Promise((ok) => { const w = new WebSocket("/ws"); w.onopen = () => w.send("hi"); w.onmessage = (m) => { w.close(); ok(m.data) }; w.onerror = () => ok("error") })`,
	} {
		want := map[string]string{"fetch": "inner-main", "EventSource": "hello", "WebSocket": ":hi"}[what]
		if got := b.eval(js); got != want {
			t.Errorf("%s: %v", what, got)
		}
	}
	// Another session, and the API, are other origins: no script reaches them.
	r.run("other", echo)
	for what, js := range map[string]string{
		"read":      fmt.Sprintf(`fetch(%q, {credentials: "include"}).then(() => "reached", () => "blocked")`, r.url("other.localhost", "/")),
		"write":     fmt.Sprintf(`fetch(%q, {method: "POST", mode: "no-cors", credentials: "include"}).then(() => "sent", () => "blocked")`, r.url("", "/v1/sessions?sessionId=evil")),
		"WebSocket": fmt.Sprintf(`new Promise((ok) => { const w = new WebSocket(%q); w.onopen = () => ok("reached"); w.onerror = () => ok("blocked") })`, r.url("other.localhost", "/ws")),
	} {
		if got := b.eval(js); got == "reached" {
			t.Errorf("%s: %v", what, got)
		}
	}
	if r.server.created != nil {
		t.Error("a session's page created a session")
	}
}
