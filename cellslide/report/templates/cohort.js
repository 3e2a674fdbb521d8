
(function(){
var body=document.querySelector('tbody'),heads=[].slice.call(document.querySelectorAll('thead th'));
var find=document.getElementById('find'),only=document.getElementById('only'),shown=document.getElementById('shown');
var rows=[].slice.call(body.rows);
var texts=rows.map(function(r){return r.textContent.toLowerCase();});
function mark(r){var cell=r.querySelector('td.m');if(!cell||cell.firstElementChild)return;
var signs=cell.textContent.trim();cell.textContent='';[].forEach.call(signs,function(sign){
var e=document.createElement({'○':'u','✗':'b'}[sign]||'i');e.textContent=sign;cell.appendChild(e);});}
function key(row,k,number){var cell=row.cells[k],v=cell.getAttribute('data-v');
if(v===null)v=cell.textContent;return number?(v===''?NaN:Number(v)):v.toLowerCase();}
function sort(th,k){var up=th.getAttribute('aria-sort')!=='ascending',number=th.hasAttribute('data-n');
heads.forEach(function(h){h.removeAttribute('aria-sort');});
th.setAttribute('aria-sort',up?'ascending':'descending');
var keyed=rows.map(function(r,i){return [key(r,k,number),i,r];});
keyed.sort(function(a,b){var x=a[0],y=b[0];
if(number){var nx=x!==x,ny=y!==y;if(nx||ny)return nx===ny?a[1]-b[1]:nx?1:-1;}
return x<y?(up?-1:1):x>y?(up?1:-1):a[1]-b[1];});
var all=document.createDocumentFragment();keyed.forEach(function(e){all.appendChild(e[2]);});
body.appendChild(all);filter();}
heads.forEach(function(th,k){th.firstChild.addEventListener('click',function(){sort(th,k);});});
var step=200,limit=step,more=document.getElementById('more');
function filter(){var text=find.value.toLowerCase(),n=0,k=0;
[].forEach.call(body.rows,function(r){var see=(!only.checked||r.className!=='')&&
(text===''||texts[r.place].indexOf(text)>=0);
if(see)n++;see=see&&n<=limit;if(see){k++;mark(r);}if(r.hidden===see)r.hidden=!see;});
shown.textContent=n+' of '+rows.length+' found'+(k<n?', the first '+k+' shown':'');more.hidden=k===n;}
function anew(){limit=step;filter();}
rows.forEach(function(r,i){r.place=i;});
find.addEventListener('input',anew);only.addEventListener('change',anew);
more.addEventListener('click',function(){limit+=step*5;filter();});filter();
})();
